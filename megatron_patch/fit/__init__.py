"""Where a loss is lowest: optima with intervals, or a refusal, and what they say about transfer."""

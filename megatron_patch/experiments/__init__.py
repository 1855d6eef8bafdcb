"""From text to tokens, from sweeps to tables: what happens before and after a training run."""

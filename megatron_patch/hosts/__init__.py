"""A run on several hosts from the outside: checked before it starts, watched, ended everywhere, and judged."""

"""Runs and sweeps as one page that people look at."""

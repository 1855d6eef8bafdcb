"""Equations of width transfer as functions of plain numbers; imports the standard library and nothing else."""

"""Writes what a run leaves in its folder (checkpoints, metrics, grids), and stops a run without losing any of it."""

"""Predicts what a run needs before it starts: memory, seconds and traffic, and what to change if it does not fit."""

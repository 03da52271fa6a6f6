"""What a run takes, before it starts: memory, seconds and traffic, and what to change where it does not fit."""

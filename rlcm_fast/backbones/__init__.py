"""Models: where their files are and how they are loaded."""

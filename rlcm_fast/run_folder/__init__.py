"""What a run leaves in its folder: checkpoints, metrics and grids; and how it stops without losing any of it."""

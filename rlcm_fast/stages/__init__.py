"""What an iteration does, stage by stage: rollout, update, evaluation, and what an update adds to its loss."""

"""The console script rlcm-fast: draw images (sample), score a model (evaluate), plan its training (plan)."""

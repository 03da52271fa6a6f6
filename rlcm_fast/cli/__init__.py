"""The console script rlcm-fast: look at a model (sample), measure it (evaluate), plan its training (plan)."""

"""The console script rlcm-fast: look at a model (sample) and measure it (evaluate)."""

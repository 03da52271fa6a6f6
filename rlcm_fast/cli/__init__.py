"""The console script rlcm-fast: look at a model, measure it, find a config, plan a training; a file per command."""

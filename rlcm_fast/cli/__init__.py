"""The console script rlcm-fast: draw images, score a model, find a config, plan a training; one file per command."""

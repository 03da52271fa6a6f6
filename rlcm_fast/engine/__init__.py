"""Engines: where weights, gradients and optimizer states live, and how they step."""

"""Where weights, gradients and optimizer state live."""

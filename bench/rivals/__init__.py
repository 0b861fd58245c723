"""Training steps of other implementations, for comparison with the engine."""

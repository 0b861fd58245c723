"""Setup, checkpoints, metrics and history of a run."""

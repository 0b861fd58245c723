"""What a run is in its folder: set-up, checkpoints, metrics, history."""

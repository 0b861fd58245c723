"""Benches of the training step and its parts."""

"""Benches of the training step and its components."""

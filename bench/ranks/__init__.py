"""Benches with several ranks."""

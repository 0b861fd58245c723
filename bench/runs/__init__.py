"""Benches of whole runs: start, data, accuracy, report."""

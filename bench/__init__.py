"""Benchmarks of the engine and the report of their records."""

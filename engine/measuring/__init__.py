"""Measure time, memory and traces, and read and write the records."""

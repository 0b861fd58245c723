"""Data sets: their sources, decoding, memory-mapped caches and label splits."""

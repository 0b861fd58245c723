"""An emulated CUDA device, for hosts that have none: see run.py."""

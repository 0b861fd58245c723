"""An emulated CUDA device for hosts without a GPU. See run.py."""

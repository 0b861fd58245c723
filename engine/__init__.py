"""The training engine: configuration, networks, the step, the trainer and the command line."""

__version__ = "0.1.0"  # setup.py reads it from here.

"""The training engine: configuration, networks, the step, the trainer and the command line."""

"""The random plan of each step, CTAugment, and the backends that make views; `data` holds data sets."""

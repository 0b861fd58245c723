"""Data sets, label splits, the random plan of each step, CTAugment, and augmented views (DALI or a Triton kernel)."""

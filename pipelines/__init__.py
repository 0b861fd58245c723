"""Data: data sets and label splits, the plan of every step, CTAugment's policy, and the DALI views."""

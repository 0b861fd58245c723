"""Section 3 of the paper: which samples are trained, their targets, their losses."""

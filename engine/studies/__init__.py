"""Many runs: tables of the paper, ablations, profiles."""

"""Studies over several runs: tables of the paper, ablations, profiles."""

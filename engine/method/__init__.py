"""The method, section 3 of the paper: batch layout, targets and losses."""

"""Networks with a classifier and a rotation head."""

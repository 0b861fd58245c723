"""Ranks: how they start, what they exchange, what watches over them."""

"""Distributed training: launching ranks, collectives, and a watchdog."""

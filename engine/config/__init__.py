"""Configurations: fields, checks, presets, methods, and ablations."""

from engine.config.config import Config

__all__ = ["Config"]

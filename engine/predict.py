"""Former name of `engine.inference.predict`, for scripts that import it."""

from engine.inference.predict import read_image

__all__ = ["read_image"]

"""Former name of `pipelines.data.decode`, for scripts that import it."""

from pipelines.data.decode import decode

__all__ = ["decode"]

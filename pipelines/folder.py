"""Former name of `pipelines.data.folder`, for scripts that import it."""

from pipelines.data.folder import cache_of, open_folder, prepare, scan
from pipelines.data.splits import hold_out as _hold_out

__all__ = ["_hold_out", "cache_of", "open_folder", "prepare", "scan"]

"""The HTML page of `remixmatch report`."""

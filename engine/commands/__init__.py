"""Entry points of `remixmatch COMMAND`: options, their checks, and what is printed."""

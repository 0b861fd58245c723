"""What `remixmatch COMMAND` calls: options, their checks, and what is printed."""

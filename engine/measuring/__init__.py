"""How time, memory and traces are measured, and the records of it."""

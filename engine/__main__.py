"""`python -m engine` is `remixmatch`: what torchrun starts."""

from engine.cli import main

main()

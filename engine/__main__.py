"""`python -m engine` is `remixmatch`: what torchrun starts."""

from engine.commands.main import main

main()

"""`python -m engine` is `remixmatch`; torchrun starts ranks this way."""

from engine.commands.main import main

main()

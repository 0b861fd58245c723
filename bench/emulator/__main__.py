"""Entry point of `python -m bench.emulator`. See run.py."""

from bench.emulator.run import main

main()

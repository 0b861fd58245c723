"""`python -m bench.emulator ...`: see run.py."""

from bench.emulator.run import main

main()

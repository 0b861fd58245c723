"""Run `remixmatch bench NAME` as `python -m bench NAME`, from a checkout that is not installed."""

import sys

from engine.commands.main import main

sys.argv.insert(1, "bench")  # Records store the command line of the installed `remixmatch`.
main()

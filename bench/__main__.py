"""`python -m bench NAME` is `remixmatch bench NAME`, in a checkout that nobody installed."""

import sys

from engine.commands.main import main

sys.argv.insert(1, "bench")  # records give the command as an installed engine has it
main()

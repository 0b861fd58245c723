"""`python -m engine` is `remixmatch`; torchrun starts ranks this way."""

import sys
from pathlib import Path

# `python -m` searches the working folder first, where a file such as torch.py would hide the library.
if not sys.flags.safe_path and sys.path[0] != str(Path(__file__).resolve().parents[1]):
    del sys.path[0]

from engine.commands.main import main

main()

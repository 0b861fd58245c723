"""`python -m bench NAME` is `remixmatch bench NAME`, in a checkout that nobody installed."""

import sys

from bench.cli import main
from engine.errors import UserError

sys.argv.insert(1, "bench")  # rows give the command as an installed engine has it
try:
    main(sys.argv[2:])
except UserError as error:
    print(f"remixmatch: {error}", file=sys.stderr)
    sys.exit(2)

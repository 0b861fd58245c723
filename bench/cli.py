"""`remixmatch bench NAME`: lists the benches and runs one."""

from __future__ import annotations

from collections.abc import Sequence

from bench import registry
from engine.commands.parsing import parse, show_usage
from engine.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Run the bench that the first argument names.

    Raises:
        UserError: no bench, or an unknown one.
    """
    benches = registry.find()
    if not argv or argv[0] in ("-h", "--help"):
        texts = {name: listed.help for name, listed in benches.items()}
        show_usage("bench NAME [flags]", texts, "remixmatch bench NAME --help lists its flags.")
        if not argv:
            raise UserError("bench needs a name")
        return
    if argv[0] not in benches:
        raise UserError(f"bench takes one of {', '.join(benches)}")
    bench = benches[argv[0]].load()
    options = parse(bench.options, f"bench {argv[0]}", list(argv[1:]))

    from engine.measuring import records

    records.commit()  # Records name the commit that was there at the start, whatever is committed meanwhile.
    bench.main(options)

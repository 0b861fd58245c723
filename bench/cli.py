"""The command `remixmatch bench`, which lists the benches and runs one."""

from __future__ import annotations

from collections.abc import Sequence

from bench import registry
from engine.commands.parsing import parse, show_usage_if_asked
from engine.errors import unknown


def main(argv: Sequence[str]) -> None:
    """Run the bench named by the first argument.

    Raises:
        UserError: The bench is missing or unknown.
    """
    benches = registry.find()
    texts = {name: listed.help for name, listed in benches.items()}
    if show_usage_if_asked(argv, "name", "bench NAME [flags]", texts, "remixmatch bench NAME --help lists its flags."):
        return
    if argv[0] not in benches:
        raise unknown("bench", argv[0], benches)
    bench = benches[argv[0]].load()
    options = parse(bench.options, f"bench {argv[0]}", list(argv[1:]))

    from engine.measuring import records

    records.commit()  # Cached here: records name the commit at the start, even if HEAD moves during the run.
    bench.main(options)

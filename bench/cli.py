"""`remixmatch bench NAME`: one entry a bench."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from engine.cli import parse
from engine.errors import UserError

# module of each bench, with its options and `main`; imported when it is called for
BENCHES = {
    "digits": "DigitsOptions",
    "baseline": "BaselineOptions",
    "kernels": "KernelsOptions",
    "pipelines": "PipelinesOptions",
    "host": "HostOptions",
    "throughput": "ThroughputOptions",
    "scaling": "ScalingOptions",
    "start": "StartOptions",
    "restart": "RestartOptions",
    "report": "ReportOptions",
}


def main(argv: Sequence[str]) -> None:
    """Runs the bench that the first word names.

    Raises:
        UserError: no such bench.
    """
    if not argv or argv[0] not in BENCHES:
        raise UserError(f"bench takes one of {', '.join(BENCHES)}")
    bench = import_module(f"bench.{argv[0]}")
    options = parse(getattr(bench, BENCHES[argv[0]]), f"bench {argv[0]}", list(argv[1:]))

    from bench import records

    records.commit()  # what runs is what was there at the start, whatever is committed meanwhile
    bench.main(options)

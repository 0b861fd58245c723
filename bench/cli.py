"""`remixmatch bench NAME`: one entry a bench."""

from __future__ import annotations

from collections.abc import Sequence

from bench import baseline, digits, host, kernels, pipelines, records, report, restart, scaling, throughput
from engine.cli import parse
from engine.errors import UserError

BENCHES = {
    "digits": (digits.DigitsOptions, digits.main),
    "baseline": (baseline.BaselineOptions, baseline.main),
    "kernels": (kernels.KernelsOptions, kernels.main),
    "pipelines": (pipelines.PipelinesOptions, pipelines.main),
    "host": (host.HostOptions, host.main),
    "throughput": (throughput.ThroughputOptions, throughput.main),
    "scaling": (scaling.ScalingOptions, scaling.main),
    "restart": (restart.RestartOptions, restart.main),
    "report": (report.ReportOptions, report.main),
}


def main(argv: Sequence[str]) -> None:
    """Runs the bench that the first word names.

    Raises:
        UserError: no such bench.
    """
    if not argv or argv[0] not in BENCHES:
        raise UserError(f"bench takes one of {', '.join(BENCHES)}")
    records.commit()  # what runs is what was there at the start, whatever is committed meanwhile
    options, bench = BENCHES[argv[0]]
    bench(parse(options, f"bench {argv[0]}", list(argv[1:])))  # type: ignore[operator]

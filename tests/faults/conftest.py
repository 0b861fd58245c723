"""Options, fixtures and the summary of fault injection."""

import dataclasses

import pytest

from tests.faults.victim import INTERVAL, Outcome, References


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=0, help="number of injections, distributed over all kinds and seeds")


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Undisturbed runs."""
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def record(request):
    """A list of outcomes for the summary of the session."""
    outcomes = []
    yield outcomes
    # pytest-xdist transfers user properties from the worker process.
    request.node.user_properties += [("fault", dataclasses.asdict(outcome)) for outcome in outcomes]


def pytest_terminal_summary(terminalreporter):
    ended = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown"
    ]
    outcomes = [Outcome(**value) for report in ended for name, value in report.user_properties if name == "fault"]
    if not outcomes:
        return
    for outcome in outcomes:
        if not outcome.survived:
            terminalreporter.write_line(f"not survived: {outcome}")
    lost = [outcome.lost for outcome in outcomes]
    terminalreporter.write_line(
        f"faults: {len(outcomes)} injected, {sum(outcome.survived for outcome in outcomes)} survived, "
        f"{sum(lost)} steps lost (at most {max(lost)} at once, interval {INTERVAL}), "
        f"{sum(outcome.bits or 0 for outcome in outcomes)} bits differ"
    )

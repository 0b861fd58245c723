import pytest

from tests.faults.victim import INTERVAL, References

OUTCOMES = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=0, help="so many injections, over all kinds and further seeds")


def pytest_configure(config):
    config.stash[OUTCOMES] = []


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Runs that nothing was done to."""
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def record(request):
    """A list of outcomes, for the summary of the whole session."""
    return request.config.stash[OUTCOMES]


def pytest_terminal_summary(terminalreporter, config):
    outcomes = config.stash.get(OUTCOMES, [])
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

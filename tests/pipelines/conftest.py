import pytest

from pipelines.data import datasets


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Return an empty folder for caches."""
    folder = tmp_path / "data"
    monkeypatch.setenv("REMIXMATCH_DATA", str(folder))
    datasets.prepared.cache_clear()
    yield folder
    datasets.prepared.cache_clear()

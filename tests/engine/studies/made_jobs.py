"""Jobs for tests, and the files of finished ones."""

import json

from engine.config.config import config_json
from engine.studies.paper_tables import TABLES, make_entries


def entries(name, *flags, **options):
    return make_entries(TABLES[name], flags, **options)


def finish(out, entry, accuracy, median=None):
    """Write the files of a finished run."""
    folder = out / entry.job.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_json(entry.job.config))
    summary = {
        "steps": entry.job.config.steps, "test_accuracy": accuracy, "median_last_20": median or accuracy - 1,
        "train_seconds": 10.0, "cpu_seconds": 20.0, "device": "a device", "versions": {"torch": "9.9"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))

"""`data split` prints the images that `train` uses, for every rule, several presets, and unequal classes."""

import json

import numpy as np
import pytest

from engine.commands.main import main
from engine.config.presets import PRESETS, of_data_set
from engine.errors import UserError
from engine.runs.folder import read_split
from engine.runs.setup import setup_run, write_run_files
from pipelines.data import cache
from pipelines.data.datasets import digits
from pipelines.data.splits import RULES

QUICK = ["--steps", "2", "--batch", "4", "--k", "1", "--width", "8", "--blocks", "1", "--eval-every", "2"]
QUICK += ["--device", "cpu", "--log", "none", "--quiet"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache with a few made-up images for the presets of CIFAR-10 and STL-10."""
    monkeypatch.setenv("REMIXMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for name, count, unknown in (("cifar10", 1200, 0), ("stl10", 1400, 150)):
        with cache.writing(tmp_path / "data" / name) as temporary:
            labels = np.where(np.arange(count) < count - unknown, np.arange(count) % 10, -1)
            cache.array(temporary, "train_images", (count, 32, 32, 3))[:] = np.arange(count)[:, None, None, None] % 251
            cache.save(temporary, "train_labels", labels)
            cache.array(temporary, "test_images", (20, 32, 32, 3))
            cache.save(temporary, "test_labels", np.arange(20) % 10)
            cache.finish(temporary, name, tuple("abcdefghij"))
    return tmp_path


def printed(capsys, *words):
    capsys.readouterr()
    main(["data", "split", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


IMBALANCED = ["--imbalance", 4, "--imbalance-unlabeled", -3, "--m1", 50]


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("imbalance", [[], IMBALANCED, ["--imbalance-labeled", 5, "--n1", 20]])
@pytest.mark.parametrize("preset", ["digits-40", "digits-10", "cifar10-250", "stl10-1000"])
def test_a_run_has_the_split_that_is_printed(capsys, folder, preset, rule, imbalance):
    from engine.commands.options import parse_train

    words = [*(["--split", rule] if rule else []), *imbalance, "--seed", 3]
    if preset == "digits-10" and imbalance and rule != "all" and "--n1" not in imbalance:
        words += ["--labels", 50]
    config = parse_train([preset, *map(str, words)], PRESETS[preset]).config
    try:
        write_run_files(setup_run(config, folder / "run"))
    except UserError as error:
        with pytest.raises(SystemExit):
            main(["data", "split", preset, *map(str, words)])
        assert str(error) in capsys.readouterr().err
        assert imbalance and (rule == "all" or preset == "stl10-1000" or "needs" in str(error)), error
    else:
        assert printed(capsys, preset, *words) == read_split(folder / "run")


def test_a_trained_run_has_the_split_that_is_printed(capsys, folder):
    words = ["digits-40", "--seed", "1", "--imbalance", "5", "--imbalance-unlabeled", "-7"]
    main(["train", *words, *QUICK, "--out", "run"])
    found = printed(capsys, *words)
    assert found == read_split(folder / "run")
    labels = digits().train_labels
    assert np.bincount(labels[found["train_rows"]]).tolist() == found["labels_per_class"]
    assert np.bincount(labels[found["unlabeled_rows"]]).tolist() == found["unlabeled_per_class"]
    assert found["labels"] == sum(found["labels_per_class"]) == 40 and found["imbalance"] == [5, -7]
    assert found["data"]["unlabeled images"]["count"] == len(found["unlabeled_rows"])
    main(["data", "split", *words])
    text = capsys.readouterr().out
    assert f"labels per class: 0 {found['labels_per_class'][0]}, 1 {found['labels_per_class'][1]}, " in text
    assert f"unlabeled images per class: 0 {found['unlabeled_per_class'][0]}, " in text
    main(["data", "check-split", "run"])
    assert capsys.readouterr().out.startswith("identical to rule balanced, 40 labels of digits, seed 1")


def test_a_data_set_has_the_rule_and_the_seed_of_its_presets(capsys):
    for name, config in PRESETS.items():
        if config.dataset in ("digits", "cifar10", "stl10") and config.labels <= 1000:
            assert of_data_set(config.dataset).split == config.split and of_data_set(config.dataset).seed == config.seed
            found, of_preset = (
                printed(capsys, *words) for words in ((config.dataset, "--labels", config.labels), (name,))
            )
            assert found["train_rows"] == of_preset["train_rows"] and found["seed"] == of_preset["seed"]
    assert of_data_set("folder:/pets").split == PRESETS["folder"].split == "all"

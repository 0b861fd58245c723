"""Confusion matrices, recalls and balanced accuracy, against values worked out by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from engine.commands import inference
from engine.commands import main as cli
from engine.inference.confusion import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    geometric_mean,
    recall_table,
    recalls,
)
from engine.inference.evaluation import evaluate
from engine.inference.trained import load_ema_model
from pipelines.data.datasets import digits

# Of four cats, three are recognized; of two dogs, one; nothing else is in the test set, but one dog looks like an emu.
LABELS = np.array([0, 1, 0, 0, 1, 0])
PREDICTED = np.array([0, 2, 1, 0, 1, 0])
NAMES = ("cat", "dog", "emu")


def test_rows_are_labels_and_columns_are_predictions():
    matrix = confusion_matrix(LABELS, PREDICTED, 3)
    assert matrix.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 0]] and matrix.dtype == np.int64


def test_recall_of_present_and_absent_classes():
    matrix = confusion_matrix(LABELS, PREDICTED, 3)
    assert recalls(matrix) == [75.0, 50.0, None]
    assert accuracy(matrix) == pytest.approx(100 * 4 / 6)
    assert balanced_accuracy(recalls(matrix)) == 62.5, "the mean of 75 and 50: emus are not in the test set"
    assert geometric_mean(recalls(matrix)) == pytest.approx((75 * 50) ** 0.5)
    assert geometric_mean([100.0, 0.0, 50.0]) == 0


def test_table_of_few_classes():
    assert recall_table(confusion_matrix(LABELS, PREDICTED, 3), NAMES) == [
        "class  images   recall  most often mistaken for",
        "cat         4  75.00 %  dog (1 of 4)",
        "dog         2  50.00 %  emu (1 of 2)",
    ]


def test_table_without_mistakes():
    assert recall_table(np.diag([2, 0, 10]), ("a", "b", "a long name"))[1:] == [
        "a                 2  100.00 %",
        "a long name      10  100.00 %",
    ]


def test_table_of_many_classes_has_those_with_the_lowest_recall():
    """Class i of 25 has i correct images of 24; one class of 26 has no images."""
    matrix = np.zeros((26, 26), np.int64)
    for number in range(25):
        matrix[number, number], matrix[number, 24 - number if number != 12 else 13] = number, 24 - number
    matrix[24, 24] = 24
    lines = recall_table(matrix, [f"class {number}" for number in range(26)])
    assert lines[0] == "the 10 of 25 classes with the lowest recall:"
    assert lines[2] == "class 0      24   0.00 %  class 24 (24 of 24)"
    assert lines[-1] == "class 9      24  37.50 %  class 15 (15 of 24)" and len(lines) == 12


def test_eval_reports_what_the_network_predicts(trained, capsys):
    cli.main(["eval", str(trained), "--json"])
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((trained / "summary.json").read_text())
    for name in ("test_accuracy", "recall", "balanced_accuracy", "geometric_mean"):
        assert result[name] == summary[name]
    network, data = load_ema_model(trained).network, digits()
    with torch.no_grad():
        best = network(torch.from_numpy(data.test_images).permute(0, 3, 1, 2) / 127.5 - 1)[0].argmax(1).numpy()
    for label, row in enumerate(result["confusion_matrix"]):
        assert row == [((data.test_labels == label) & (best == predicted)).sum() for predicted in range(10)]
    of_each = [100 * (best[data.test_labels == label] == label).mean() for label in range(10)]
    assert list(result["recall"]) == result["classes"] == [str(label) for label in range(10)]
    assert list(result["recall"].values()) == pytest.approx(of_each)
    assert result["balanced_accuracy"] == pytest.approx(sum(of_each) / 10)
    assert result["geometric_mean"] == pytest.approx(np.prod(of_each) ** 0.1)
    assert 100 * (best == data.test_labels).mean() == pytest.approx(result["test_accuracy"])
    twice = (np.concatenate([each, each]) for each in (data.test_images, data.test_labels))  # More than one batch.
    accuracy_of_both, _, predicted = evaluate(network, *twice, torch.device("cpu"))
    assert predicted.tolist() == [*best, *best] and accuracy_of_both == pytest.approx(result["test_accuracy"])
    cli.main(["eval", str(trained)])
    first, second, _, *rows = capsys.readouterr().out.splitlines()
    assert f"test accuracy {result['test_accuracy']:.2f} % of 360 images" in first
    means = result["balanced_accuracy"], result["geometric_mean"]
    assert second == "balanced accuracy {:.2f} %, geometric mean of recalls {:.2f} %".format(*means)
    assert [row.split()[:3] for row in rows] == [[str(i), "36", f"{of_each[i]:.2f}"] for i in range(10)]


def test_eval_of_a_test_part_that_lacks_classes(trained, capsys, monkeypatch):
    data = digits()
    some = np.isin(data.test_labels, (3, 5))
    part = dataclasses.replace(data, test_images=data.test_images[some], test_labels=data.test_labels[some])
    monkeypatch.setattr(inference, "open_data", lambda name, **options: part)
    cli.main(["eval", str(trained), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [name for name, recall in result["recall"].items() if recall is not None] == ["3", "5"]
    assert result["balanced_accuracy"] == pytest.approx((result["recall"]["3"] + result["recall"]["5"]) / 2)
    assert [sum(row) for row in result["confusion_matrix"]] == [0, 0, 0, 36, 0, 36, 0, 0, 0, 0]
    cli.main(["eval", str(trained)])
    _, balanced, _, *rows = capsys.readouterr().out.splitlines()
    assert balanced.endswith(" %; 8 classes have no test images") and [row.split()[0] for row in rows] == ["3", "5"]

"""Values from Python, JSON and YAML: converted to the type of their field, or refused in one line."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.api import train
from engine.config.config import convert_fields
from engine.errors import UserError


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("k", np.int64(3), 3),
        ("k", torch.tensor(3), 3),
        ("k", np.array(3), 3),
        ("stem_channels", np.uint8(8), 8),
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("lr", np.int32(2), 2.0),
        ("lr", Fraction(1, 4), 0.25),
        ("flip", np.bool_(False), False),
        ("mode", np.str_("eager"), "eager"),
        ("weights", Path("a/b.pt"), "a/b.pt"),
        ("class_distribution", [1, 0.0], (1.0, 0.0)),
        ("class_distribution", np.array([0.25, 0.75]), (0.25, 0.75)),
        ("class_distribution", torch.tensor([0.25, 0.75]), (0.25, 0.75)),
        ("class_distribution", [np.float64(1)], (1.0,)),
        ("class_distribution", [torch.tensor(0.25), np.array(0.75)], (0.25, 0.75)),
        ("class_distribution", (), ()),
    ],
)
def test_values_are_converted(field, value, expected):
    found = convert_fields({field: value})[field]
    assert found == expected and type(found) is type(expected)
    if isinstance(found, tuple):
        assert all(type(each) is float for each in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(precision="bf17"),
            "precision must be one of auto, fp64, fp32, bf16, fp16; got 'bf17'; did you mean bf16?",
        ),
        (dict(steps="60"), "steps must be an integer, got '60'"),
        (dict(stepz=3), "unknown configuration field 'stepz'; did you mean steps?"),
        (dict(k=2.5), "k must be an integer, got 2.5"),
        (dict(k=2.0), "k must be an integer, got 2.0"),
        (dict(k=True), "k must be an integer, got True"),
        (dict(lr=False), "lr must be a number, got False"),
        (dict(lr="0.1"), "lr must be a number, got '0.1'"),
        (dict(lr=1j), "lr must be a number, got 1j"),
        (dict(lr=10**400), "lr must be a number, got 1000"),
        (dict(seed=None), "seed must be an integer, got None"),
        (dict(steps=np.array([3, 4])), "steps must be an integer, got array([3, 4])"),
        (dict(flip=1), "flip must be true or false, got 1"),
        (dict(flip="no"), "flip must be true or false, got 'no'"),
        (dict(bn="Joint"), "bn must be one of joint, split, sync; got 'Joint'; did you mean joint?"),
        (dict(mode=b"eager"), "mode must be one of auto, eager, compile, graph; got b'eager'"),
        (dict(stem_channels=True), "stem_channels must be one of 3, 8; got True"),
        (dict(stem_channels=8.0), "stem_channels must be one of 3, 8; got 8.0"),
        (dict(dataset=3), "dataset must be text, got 3"),
        (dict(class_distribution=0.1), "class_distribution must be numbers, got 0.1"),
        (dict(class_distribution="0.5"), "class_distribution must be numbers, got '0.5'"),
        (dict(class_distribution=[0.5, "a"]), "class_distribution must be numbers, got [0.5, 'a']"),
        (dict(class_distribution={"a": 1}), "class_distribution must be numbers, got {'a': 1}"),
        (dict(lr=float("nan")), "--lr must be more than 0, got nan"),
        (dict(w_rot=float("inf")), "--w-rot must be finite, got inf"),
        (dict(seed=10**5000), "--seed must be less than 2^63, got a number of thousands of digits"),
        (dict(seed=10**5000, out=None), "--seed must be from 0 to 4294967295, got a number of thousands of digits"),
        (dict(seed=10**400, out=None), "--seed must be from 0 to 4294967295, got 1000"),
        (dict(steps=10**5000), "--steps must be less than 2^63, got a number of thousands of digits"),
        (dict(batch=-(10**5000)), "--batch must be at least 1, got a number of thousands of digits"),
        (dict(lr=10**5000), "lr must be a number, got a number of thousands of digits"),
        (dict(class_distribution=[10**5000]), "class_distribution must be numbers, got a number of thousands"),
        (dict(mode="a\x1b[31m\n" + 500 * "b"), r"mode must be one of auto, eager, compile, graph; got 'a\x1b[31m\nbbb"),
        (dict(steps_scale=1e308), "--steps-scale must be at most 1000000, got 1e+308"),
        (dict(size=32), "size requires images given in Python (data)"),
        (dict(size=32, data="folder"), "size requires images given in Python (data)"),
        (dict(data=""), "data must name a folder, got ''"),
        (dict(out=""), "out must name a folder, got ''"),
        (dict(steps=2**63), "--steps must be less than 2^63, got 9223372036854775808"),
        (dict(method="fixmach"), "unknown method 'fixmach'; did you mean fixmatch"),
        (dict(ablate="k=3"), "unknown ablation 'k=3'"),
        (dict(ablate=[3]), "ablate must be words, got [3]"),
        (dict(steps_scale="1"), "steps_scale must be a number, got '1'"),
        (dict(steps_scale=0), "--steps-scale must be more than 0, got 0"),
        (dict(resume="yes"), "resume must be true or false, got 'yes'"),
        (dict(out=3), "out must be text, got 3"),
        (dict(preset=Path("digits-4O")), "unknown preset 'digits-4O'; did you mean digits-40"),
        (dict(preset=None), "preset must be text, got None"),
    ],
)
def test_train_refuses_other_values_in_one_line(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(**{"preset": "digits-40", "out": tmp_path / "run", **given})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert not list(tmp_path.iterdir())

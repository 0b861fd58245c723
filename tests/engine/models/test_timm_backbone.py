"""timm backbones: logits, normalization, running statistics, weights, and runs."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine import run
from engine.config.checks import validate
from engine.config.config import Config, load_config
from engine.errors import UserError
from engine.inference.evaluation import class_logits
from engine.inference.trained import load_ema_model
from engine.models.build import make_network
from engine.models.timm_backbone import Backbone
from engine.runs.setup import open_data, setup_run
from engine.training.state import make_state
from tests.processes import final_state

timm = pytest.importorskip("timm", reason="needs timm")
NAME, CPU = "resnet10t", torch.device("cpu")


@pytest.fixture
def small(tiny):
    def make(**changes):
        return tiny(network=f"timm:{NAME}", batch=4, steps=2, **changes)

    return make


def test_both_heads_use_the_pooled_features():
    network = Backbone(NAME, 7, (32, 32)).eval()
    images = torch.randn(3, 3, 32, 32)
    logits, rotations = network(images)
    features = network.body.forward_head(network.body.forward_features(images), pre_logits=True)
    torch.testing.assert_close(logits, features @ network.head.weight.T + network.head.bias)
    torch.testing.assert_close(rotations, features @ network.rotation_head.weight.T + network.rotation_head.bias)
    assert logits.shape == (3, 7) and rotations.shape == (3, 4)


def test_a_model_of_fixed_size_is_built_for_the_images():
    logits, _ = Backbone("vit_tiny_patch16_224", 5, (32, 32)).eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)


def test_label_guessing_keeps_the_running_statistics_and_training_updates_them():
    network = Backbone(NAME, 7, (32, 32), bn_momentum=0.25)
    images = torch.randn(6, 3, 32, 32)
    before = network.running_statistics()
    untracked, _ = network(images, track=False)
    assert torch.equal(network.running_statistics(), before)
    tracked, _ = network(images)
    torch.testing.assert_close(tracked, untracked)
    (norm,) = [m for m in network.body.modules() if hasattr(m, "running_mean")][:1]
    inputs = []
    norm.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    mean = norm.running_mean.clone()
    network(images)
    torch.testing.assert_close(norm.running_mean, 0.75 * mean + 0.25 * inputs[0].mean((0, 2, 3)))


def test_running_statistics_are_those_of_all_batch_norms():
    network = Backbone(NAME, 7, (32, 32))
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert network.running_statistics().numel() == sum(2 * norm.num_features for norm in norms)
    network.set_running_statistics(torch.arange(network.running_statistics().numel()).float())
    assert torch.equal(norms[0].running_var, torch.arange(norms[0].num_features, 2 * norms[0].num_features).float())
    without = Backbone("vit_tiny_patch16_224", 5, (32, 32))
    assert without.running_statistics().numel() == 0
    without.set_running_statistics(without.running_statistics())


def test_images_are_normalized_by_timms_data_config():
    network = Backbone(NAME, 7, (16, 16)).eval()
    images = np.random.default_rng(0).integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    actual = torch.cat([logits for _, logits in class_logits(network, images, CPU, rows=2)])
    data = timm.data.resolve_model_data_config(network.body)
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert data["mean"] != (0.5, 0.5, 0.5), "otherwise the default normalization would pass"
    torch.testing.assert_close(actual, network((pixels - mean) / std)[0], atol=1e-5, rtol=1e-4)


def test_equal_seeds_give_equal_networks_and_keep_torchs_generator(small):
    before = torch.random.get_rng_state()
    one, two, other = (make_network(small(seed=seed), 7, CPU, (16, 16)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    names = [name for name, value in one.state_dict().items() if not torch.equal(value, two.state_dict()[name])]
    assert not names and not torch.equal(one.head.weight, other.head.weight)
    assert any(not torch.equal(a, b) for a, b in zip(one.body.parameters(), other.body.parameters(), strict=True))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_a_file(small, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    whole = timm.create_model(NAME)  # With a classifier.
    save_file(whole.state_dict(), path) if suffix == "safetensors" else torch.save(
        {"state_dict": whole.state_dict()}, path
    )
    state = make_state(small(weights=str(path)), 7, CPU, (16, 16))
    for network in (state.network, state.ema_model):
        for name, value in network.body.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


def test_weights_that_cannot_be_loaded(small, tmp_path, monkeypatch):
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.pth"
    save_file(timm.create_model("resnet18").state_dict(), other)
    damaged.write_bytes(b"PK\x03\x04 and then nothing")
    for path, words in [
        (other, "is for a different model: "),
        (damaged, "cannot be read"),
        (tmp_path / "no.pth", "no such file"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            make_network(small(weights=str(path)), 7, CPU)
        assert "\n" not in str(error.value)

    def without_network(*arguments, **options):
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.raises(UserError, match=r"cannot download .* \(no route to the hub\); if .* use --weights FILE"):
        make_network(small(pretrained=True), 7, CPU)


def test_unknown_names():
    with pytest.raises(UserError, match=r"--network: timm .* has no model 'resnet5'; did you mean .*resnet50"):
        Backbone("resnet5", 7, (32, 32))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(network="resnet50"), "--network must be wide-resnet, timm:NAME or auto, got 'resnet50'"),
        (dict(network="timm:resnet50", bn="split"), "--bn split requires a Wide ResNet"),
        (dict(pretrained=True), "require a timm model"),
        (dict(network="timm:resnet50", pretrained=True, weights="a"), "mutually exclusive"),
    ],
)
def test_invalid_flags(changes, words):
    with pytest.raises(UserError, match=words):
        validate(dataclasses.replace(Config(), **changes))


def test_a_run_trains_resumes_bitwise_and_classifies(small, tmp_path):
    config = small(checkpoint_every=1)
    run.train(setup_run(dataclasses.replace(config, steps=1), tmp_path / "run"), quiet=True)
    run.train(setup_run(config, tmp_path / "run", resume=True), quiet=True)
    run.train(setup_run(config, tmp_path / "straight"), quiet=True)
    one, two = (final_state(tmp_path / name)[1]["state"]["ema_model"] for name in ("run", "straight"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert load_config(tmp_path / "run" / "config.json").network == f"timm:{NAME}"
    trained = load_ema_model(tmp_path / "run")
    images = open_data(config.dataset).test_images
    logits = next(class_logits(trained.network, images, trained.device, rows=3))[1]
    assert logits.shape == (3, 10) and logits.isfinite().all()

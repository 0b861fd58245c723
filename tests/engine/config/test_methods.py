"""Methods and ablations against direct implementations of their papers, in float64, on the same views and plans."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.api import train
from engine.commands.main import main
from engine.commands.options import ConfigurationOptions, parse_train
from engine.config import methods
from engine.config.checks import validate
from engine.config.config import load_config
from engine.config.methods import ABLATIONS, METHODS, OWN_SETTINGS, ablate, with_method
from engine.config.presets import PRESETS, preset
from engine.config.scaling import ramp_steps
from engine.errors import UserError
from engine.method.batch_layout import rank_plan
from engine.run import _published
from engine.runs.folder import default_folder
from engine.training.feed import plan_spec, rank_layout
from engine.training.state import make_state
from engine.training.step import METRICS, Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.data.cache import DataSet
from pipelines.plan import make_plan

CLASSES, START = 5, 40
CPU = torch.device("cpu")


@pytest.fixture
def config_of(tiny):
    """Make small configurations in double precision: `config_of("fixmatch", "k=2", mu=2)`."""

    def make(method, *ablations, **changes):
        base = with_method(tiny(precision="fp64", ramp_kimg=1.0), method)
        return dataclasses.replace(ablate(base, *ablations), **changes)

    return make


class Bench:
    """One step of a method on random views, with its gradients and the inputs of a direct implementation."""

    def __init__(self, config, precision=torch.float64, compiled=False, **buffers):
        validate(config)
        rng = torch.Generator().manual_seed(3)
        images = np.zeros((60, 8, 8, 3), np.uint8)
        data = DataSet("made up", tuple("abcde"), images, np.arange(60) % CLASSES, images[:1], np.zeros(1, np.int64))
        spec = plan_spec(config, data, np.arange(20))
        self.config = config
        self.plan = make_plan(spec, 0, START, initial_weights())
        self.labels = np.random.default_rng(1).integers(CLASSES, size=config.batch)
        state = make_state(config, CLASSES, CPU, unlabeled_images=spec.unlabeled_images)
        for p in [*state.network.parameters(), *state.ema_model.parameters()]:
            p.data += 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        state.targets.p_model_history.copy_(torch.rand(128, CLASSES, generator=rng).softmax(-1))
        state.targets.label_marginal.copy_(torch.rand(CLASSES, generator=rng).softmax(-1))
        for name, value in buffers.items():
            getattr(state.targets, name).copy_(value)
        state.step.fill_(START)
        self.before = copy.deepcopy(state)
        views = torch.randint(0, 256, (config.batch * spec.blocks, 8, 8, 3), generator=rng, dtype=torch.uint8)
        rows = rank_layout(config, spec, 0, 1)
        step = Step(config, state, rows, precision, compiled)
        state.optimizer.step, state.optimizer.zero_grad = lambda: None, lambda: None  # Keep the gradients.
        output = step(StepInput.pack(views[rows.views], rank_plan(rows, self.plan, self.labels), CPU))
        self.metrics = dict(zip(METRICS, output.metrics.tolist(), strict=True))
        self.omega = output.omega
        self.state = state
        # Blocks of images, normalized, in double precision: (mu B or B, 3, 8, 8).
        images = (views.double() / 127.5 - 1).permute(0, 3, 1, 2)
        unlabeled = config.mu * config.batch if config.unlabeled else 0
        sizes = [config.batch] + [unlabeled] * (config.k + (config.anchor != "none")) * config.unlabeled
        self.x, *self.u = images[: sum(sizes)].split(sizes)
        self.one_hot = F.one_hot(torch.tensor(self.labels), CLASSES).double()

    def network(self):
        """Network before the step."""
        return copy.deepcopy(self.before.network)

    def guess(self, images):
        """Return softmax(f(images)) of one pass in training mode, without gradients."""
        with torch.no_grad():
            return self.network()(images)[0].softmax(-1)

    def align(self, q):
        p, p_model = self.before.targets.label_marginal.double(), self.before.targets.p_model_history.double().mean(0)
        aligned = q * (p + 1e-6) / (p_model + 1e-6)
        return aligned / aligned.sum(-1, keepdim=True)

    def mix(self, blocks, targets):
        """Apply mixup as planned. Returns images and targets."""
        images, targets = torch.cat(blocks), torch.cat(targets)
        lam, perm = torch.tensor(self.plan.lam).double(), torch.tensor(self.plan.perm)
        wide = lam[:, None, None, None]
        return wide * images + (1 - wide) * images[perm], lam[:, None] * targets + (1 - lam[:, None]) * targets[perm]

    @property
    def ramp(self):
        return min(1.0, START * self.config.batch / 1024 / 1.0)

    def assert_same(self, network, loss_x, loss_u, loss_u1=0.0, loss_rot=0.0, loss=None, loss_fair=0.0):
        """Compare the losses and the gradient of every parameter."""
        loss.backward()
        losses = loss, loss_x, loss_u, loss_u1, loss_rot, loss_fair
        expected = [float(torch.as_tensor(each).detach()) for each in losses]
        found = [self.metrics[name] for name in ("loss", "loss_x", "loss_u", "loss_u1", "loss_rot", "loss_fair")]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        for (name, mine), theirs in zip(self.state.network.named_parameters(), network.parameters(), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            found = torch.zeros_like(mine) if mine.grad is None else mine.grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(-1)).sum(-1)


def sharpen(q, temperature):
    powers = q ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def test_mixmatch_matches_algorithm_1_of_its_paper(config_of):
    bench = Bench(config_of("mixmatch"))
    u_1, u_2 = bench.u
    q = sum(bench.guess(torch.cat([u_1, u_2])).chunk(2)) / 2
    target = sharpen(q, 0.5)
    images, targets = bench.mix([bench.x, u_1, u_2], [bench.one_hot, target, target])
    network = bench.network()
    logits = network(images)[0]
    batch = len(bench.x)
    loss_x = cross_entropy(logits[:batch], targets[:batch]).mean()
    loss_u = (logits[batch:].softmax(-1) - targets[batch:]).square().mean()
    bench.assert_same(network, loss_x, loss_u, loss=loss_x + 75 * bench.ramp * loss_u)
    history = bench.before.targets.p_model_history.double()
    history[START] = q.mean(0)
    np.testing.assert_allclose(bench.state.targets.p_model_history, history, rtol=1e-6)
    assert bench.omega.shape == (0,) and bench.metrics["omega"] == 0 and bench.metrics["guesses_used"] == 1


@pytest.mark.parametrize(("k", "mu"), [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95])
def test_fixmatch_matches_equations_3_and_4_of_its_paper(config_of, k, mu, threshold):
    bench = Bench(config_of("fixmatch", k=k, mu=mu, threshold=threshold))
    u_weak, *u_strong = bench.u
    assert len(u_weak) == mu * len(bench.x) and len(u_strong) == k
    q = bench.guess(u_weak)
    mask = (q.amax(-1) >= threshold).double()
    network = bench.network()
    logits = network(torch.cat([bench.x, *u_strong]))[0]
    loss_x = F.cross_entropy(logits[: len(bench.x)], torch.tensor(bench.labels))
    of_views = logits[len(bench.x) :].chunk(k)
    loss_u = sum((mask * F.cross_entropy(view, q.argmax(-1), reduction="none")).mean() for view in of_views) / k
    bench.assert_same(network, loss_x, loss_u, loss=loss_x + loss_u)
    assert bench.metrics["guesses_used"] == pytest.approx(float(mask.mean()))
    assert bench.metrics["confidence"] == pytest.approx(float(mask.any()))
    assert bench.omega.shape == bench.labels.shape


@pytest.mark.parametrize(("k", "mu"), [(1, 3), (3, 2)])
@pytest.mark.parametrize("method", ["flexmatch", "dash", "freematch", "softmatch"])
def test_methods_that_adapt_the_threshold_use_targets_and_weights_of_their_own(config_of, method, k, mu):
    """tests/engine/method/test_adaptive_targets.py compares the targets and weights with the papers."""
    own = {
        "flexmatch": dict(threshold=0.45),
        "freematch": dict(w_fair=0.5),
        "dash": dict(dash_epoch_kimg=1 / 1024),
    }.get(method, {})
    # States with which some predictions are used and some are not.
    buffers = {
        "flexmatch": dict(confident_classes=torch.arange(60) % CLASSES),
        "dash": dict(rho_hat=torch.tensor(2.0)),
        "freematch": dict(threshold=torch.tensor(0.4)),
        "softmatch": dict(confidence_mean=torch.tensor(0.6), confidence_variance=torch.tensor(0.01)),
    }[method]
    bench = Bench(config_of(method, k=k, mu=mu, **own), **buffers)
    u_weak, *u_strong = bench.u
    before = bench.before.targets.state_dict()
    targets, weights = bench.before.targets(
        bench.guess(u_weak).log().float()[None], bench.before.step, torch.tensor(bench.plan.unlabeled)
    )
    assert weights.float().min() < 0.5 < weights.float().max(), "weights are only tested if they differ"
    network = bench.network()
    logits = network(torch.cat([bench.x, *u_strong]))[0]
    loss_x = F.cross_entropy(logits[: len(bench.x)], torch.tensor(bench.labels))
    of_views = logits[len(bench.x) :].chunk(k)
    loss_u = sum((weights * cross_entropy(view, targets.double())).mean() for view in of_views) / k
    loss, loss_fair = loss_x + loss_u, 0.0
    if method == "freematch":
        used = weights.double().repeat(k)[:, None]
        p = logits[len(bench.x) :].softmax(-1)
        histogram = (used * F.one_hot(p.argmax(-1), CLASSES)).sum(0)
        present = histogram > 0
        ratio = (used * p).sum(0)[present] / histogram[present]
        loss_fair = (bench.before.targets.fair_target[present] * (ratio / ratio.sum()).log()).sum()
        loss = loss + 0.5 * loss_fair
        assert abs(loss_fair) > 0.01
    bench.assert_same(network, loss_x, loss_u, loss=loss, loss_fair=loss_fair)
    for name, value in bench.before.targets.state_dict().items():
        if name not in ("p_model_history", "label_marginal"):
            torch.testing.assert_close(bench.state.targets.state_dict()[name], value, msg=name)
    if method != "softmatch":
        assert bench.metrics["guesses_used"] == pytest.approx(float((weights > 0).float().mean()))
    assert bench.metrics["confidence"] <= 1 + 1e-5
    assert before.keys() == bench.state.targets.state_dict().keys()


@pytest.mark.parametrize(("k", "mu"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_uda_uses_the_divergence_from_sharpened_confident_predictions(config_of, k, mu, threshold):
    bench = Bench(config_of("uda", k=k, mu=mu, threshold=threshold))
    u_weak, *u_strong = bench.u
    q = bench.guess(u_weak)
    mask, target = (q.amax(-1) >= threshold).double(), sharpen(q, 0.4)
    network = bench.network()
    logits = network(torch.cat([bench.x, *u_strong]))[0]
    loss_x = F.cross_entropy(logits[: len(bench.x)], torch.tensor(bench.labels))
    loss_u = 0.0
    for view in logits[len(bench.x) :].chunk(k):
        loss_u = loss_u + (mask * F.kl_div(view.log_softmax(-1), target, reduction="none").sum(-1)).mean() / k
    bench.assert_same(network, loss_x, loss_u, loss=loss_x + loss_u)


def test_pseudo_labels_are_confident_predictions_of_the_same_images(config_of):
    bench = Bench(config_of("pseudo-label", threshold=0.5))
    (u,) = bench.u
    q = bench.guess(u)
    network = bench.network()
    logits = network(torch.cat([bench.x, u]))[0]
    loss_x = F.cross_entropy(logits[: len(bench.x)], torch.tensor(bench.labels))
    loss_u = ((q.amax(-1) >= 0.5) * F.cross_entropy(logits[len(bench.x) :], q.argmax(-1), reduction="none")).mean()
    assert 0 < bench.metrics["guesses_used"] < 1, "the threshold is only tested with pseudo-labels on both sides of it"
    bench.assert_same(network, loss_x, loss_u, loss=loss_x + bench.ramp * loss_u)


@pytest.mark.parametrize("labeled_augment", ["strong", "weak", "none"])
def test_supervised_is_cross_entropy_with_or_without_mixup(config_of, labeled_augment):
    for alpha in (0.0, 0.75):
        bench = Bench(config_of("supervised", labeled_augment=labeled_augment, mixup_alpha=alpha))
        images, targets = bench.mix([bench.x], [bench.one_hot])
        assert alpha or torch.equal(images, bench.x)
        network = bench.network()
        loss_x = cross_entropy(network(images)[0], targets).mean()
        bench.assert_same(network, loss_x, 0.0, loss=loss_x)


@pytest.mark.parametrize("names", [["no-rotation"], ["no-premixup"], ["no-rotation", "no-premixup"], ["l2"],
                                   ["no-mixup"], ["mean-guess"], ["weak-only"], ["no-alignment"],
                                   ["k=4"]], ids=" ".join)  # fmt: skip
def test_ablations_change_one_component_of_remixmatch(config_of, names):
    bench = Bench(config_of("remixmatch", *names))
    u_weak, u_1, *others = bench.u
    q = bench.guess(u_weak)
    if "mean-guess" in names or "weak-only" in names:
        q = torch.stack(bench.guess(torch.cat(bench.u)).chunk(len(bench.u))).mean(0)
    target = sharpen(q if "no-alignment" in names else bench.align(q), 0.5)
    images, targets = bench.mix([bench.x, *bench.u], [bench.one_hot] + [target] * len(bench.u))
    assert torch.equal(images, torch.cat([bench.x, *bench.u])) == ("no-mixup" in names)
    premixup, rotation = "no-premixup" not in names, "no-rotation" not in names
    turned = [torch.rot90(image, int(k), (1, 2)) for image, k in zip(u_1, bench.plan.rotations, strict=True)]
    network, batch = bench.network(), len(bench.x)
    passed = torch.cat([images, *[u_1] * premixup, *[torch.stack(turned)] * rotation])
    logits, rotation_logits = network(passed)
    loss_x = cross_entropy(logits[:batch], targets[:batch]).mean()
    of_u = slice(batch, len(images))
    loss_u = cross_entropy(logits[of_u], targets[of_u]).mean()
    weight = 1.5
    if "l2" in names:
        loss_u, weight = (logits[of_u].softmax(-1) - targets[of_u]).square().mean(), 75.0
    loss_u1 = cross_entropy(logits[len(images) :][:batch], target).mean() if premixup else 0.0
    loss_rot = F.cross_entropy(rotation_logits[-batch:], torch.tensor(bench.plan.rotations)) if rotation else 0.0
    loss = loss_x + weight * bench.ramp * loss_u + 0.5 * bench.ramp * loss_u1 + 0.5 * loss_rot
    bench.assert_same(network, loss_x, loss_u, loss_u1, loss_rot, loss)
    assert len(others) == (3 if "k=4" in names else 1)


def test_without_ema_the_network_itself_is_evaluated(config_of):
    plain, averaged = (Bench(config_of("remixmatch", *names)).state for names in (["no-ema"], []))
    for state, same in ((plain, True), (averaged, False)):
        pairs = zip(state.ema_model.parameters(), state.network.parameters(), strict=True)
        assert all(torch.equal(ema, own) for ema, own in pairs) == same
    for state in (plain, averaged):
        pairs = zip(state.ema_model.buffers(), state.network.buffers(), strict=True)
        assert all(torch.equal(ema, own) for ema, own in pairs)


def test_augmentation_ablations_change_the_named_views(config_of):
    def augmented(*names, method="remixmatch", **changes):
        """Return which blocks of views have strong transformations, and which have translations."""
        bench = Bench(config_of(method, *names, max_shift=3, **changes))
        blocks = 8
        strong = bench.plan.views.ops.any(-1).reshape(-1, blocks).any(-1)
        moved = bench.plan.views.shift.any(-1).reshape(-1, blocks).any(-1)
        return strong.tolist(), moved.tolist()

    # Blocks: x, u_weak, u_1, u_2, probe.
    assert augmented() == ([True, False, True, True, True], [True] * 5)
    assert augmented("no-weak") == ([True] * 5, [True] * 5)
    assert augmented("randaugment") == ([True, False, True, True], [True] * 4)
    assert augmented("no-strong") == ([False] * 4, [True] * 4)
    assert augmented("weak-only") == ([False] * 4, [True] * 4)
    assert augmented(anchor_augment="none") == ([True, False, True, True, True], [True, False, True, True, True])
    assert augmented(method="mixmatch") == ([False] * 3, [True] * 3)
    assert augmented(method="fixmatch", mu=1) == ([False, False, True, True], [True] * 4)
    assert augmented(method="supervised", labeled_augment="none", augment="none") == ([False], [False])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_every_preset_is_valid(name, method):
    validate(with_method(preset(name), method))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_the_preset_and_is_valid(name):
    config = ablate(preset("cifar10-250"), name)
    validate(config)
    assert (config == preset("cifar10-250")) == (name == "k=8")


def parsed(*flags):
    return parse_train(["cifar10-250", *flags], preset("cifar10-250")).config


def test_flags_override_the_method_and_ablations():
    assert parsed("--method", "fixmatch") == with_method(preset("cifar10-250"), "fixmatch")
    changed = parsed("--mu", "3", "--method", "fixmatch", "--k", "2")
    assert changed == dataclasses.replace(with_method(preset("cifar10-250"), "fixmatch"), mu=3, k=2)
    assert parsed("--ablate", "k=4", "no-rotation") == ablate(preset("cifar10-250"), "k=4", "no-rotation")
    assert parsed("--ablate", "l2", "--w-u", "10").w_u == 10
    assert parsed() == preset("cifar10-250")
    svhn = with_method(preset("svhn-250"), "mixmatch")
    assert (svhn.w_u, with_method(preset("cifar10-250"), "mixmatch").w_u) == (250, 75)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("k=3",), "unknown ablation 'k=3'; did you mean"), (("k=4", "k=2"), "k cannot be both 4 and 2")],
)
def test_invalid_ablations(names, message):
    with pytest.raises(UserError, match=message):
        ablate(preset("cifar10-250"), *names)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("k=2", ["--k", "4"], "--ablate k=2 sets --k 2; leave out --k 4"),
        ("no-alignment", ["--align"], "--ablate no-alignment sets --no-align; leave out --align"),
        ("l2", ["--unlabeled-loss", "kl"], "--ablate l2 sets --unlabeled-loss l2; leave out --unlabeled-loss kl"),
    ],
)
def test_flags_cannot_undo_an_ablation(name, flags, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        parsed("--ablate", name, *flags)


@pytest.mark.parametrize(("batch", "bound"), [("0", "at least 1"), ("1" + 400 * "0", "less than 2^63")])
def test_a_batch_size_that_is_not_allowed_is_reported_with_adamatch_too(batch, bound):
    with pytest.raises(UserError, match=f"^--batch must be {re.escape(bound)}, got "):
        validate(parsed("--method", "adamatch", "--batch", batch))


@pytest.mark.parametrize("batch", [8, 16, 64])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_the_ramp_of_adamatch_takes_half_of_the_steps_for_any_batch_size(tmp_path, batch, scale):
    file = tmp_path / "run.yaml"
    file.write_text(f"method: adamatch\nbatch: {batch}\n")
    whole = {"configuration": ConfigurationOptions()}
    for flags in (["--method", "adamatch", "--batch", str(batch)], ["--config", str(file)]):
        argv = ["", *flags, "--steps-scale", str(scale)]
        config = parse_train(argv, preset("digits-40"), others=whole).config
        assert (config.batch, ramp_steps(config)) == (batch, pytest.approx(1250 * scale))
        assert parse_train([*argv, "--ramp-kimg", "2"], preset("digits-40"), others=whole).config.ramp_kimg == 2.0
    other = parse_train(["", "--method", "pi-model", "--batch", str(batch)], preset("digits-40")).config
    assert other.ramp_kimg == preset("digits-40").ramp_kimg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(anchor="none"), "requires --guess mean"),
        (dict(anchor="guess-only", guess="mean"), "requires --anchor trained or none"),
        (dict(threshold=0.5, unlabeled_loss="l2"), "requires --unlabeled-loss cross-entropy or kl"),
        (dict(threshold=1.5), "--threshold must be between 0 and 1"),
        (dict(mu=0), "--mu must be at least 1"),
        (dict(mixup_alpha=-1.0), "--mixup-alpha must be at least 0"),
        (dict(bn_stats="pool", network="timm:resnet18"), "--bn-stats pool requires a Wide ResNet"),
        (dict(flex_warmup=False), "^--no-flex-warmup requires --method flexmatch, got remixmatch$"),
        (dict(w_fair=0.1), "^--w-fair 0.1 requires --method freematch, got remixmatch$"),
        (dict(threshold_decay=1.5), "--threshold-decay must be between 0 and 1"),
        (dict(dash_epoch_kimg=0.0), "--dash-epoch-kimg must be more than 0"),
    ],
)
def test_contradicting_settings(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        validate(tiny(**changes))


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("freematch", ["--threshold", "0.9"], "--method freematch sets its own --threshold; leave out --threshold 0.9"),
        ("softmatch", ["--align"], "--method softmatch sets its own --align; leave out --align"),
        ("dash", ["--hard-labels"], "--method dash sets its own --hard-labels; leave out --hard-labels"),
        ("softmatch", ["--unlabeled-loss", "kl"],
         "--method softmatch sets its own --unlabeled-loss; leave out --unlabeled-loss kl"),
        ("flexmatch", ["--unlabeled-loss", "l2"], "--threshold requires --unlabeled-loss cross-entropy or kl, got l2"),
    ],
)  # fmt: skip
def test_settings_that_a_method_determines_itself(method, flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits-40", "--method", method, *flags])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"remixmatch: {message}\n"


@pytest.mark.parametrize(("method", "names"), OWN_SETTINGS.items())
def test_a_method_may_be_given_the_settings_it_determines(method, names):
    config = with_method(preset("digits-40"), method)
    validate(dataclasses.replace(config, **{name: getattr(config, name) for name in names}))


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown method 'fixmach'; did you mean fixmatch"):
        methods.with_method(preset("digits-40"), "fixmach")


@pytest.mark.compiler
@pytest.mark.parametrize("method", ["fixmatch", pytest.param("mixmatch", marks=pytest.mark.long)])
def test_compiled_steps_match_eager_steps(tiny, method):
    torch._dynamo.reset()
    config = with_method(tiny(scales=1, blocks=1, ramp_kimg=1.0), method)
    eager, compiled = (Bench(config, torch.float32, compiled) for compiled in (False, True))
    for name, value in eager.metrics.items():
        assert compiled.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for mine, theirs in zip(eager.state.network.parameters(), compiled.state.network.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_the_api_trains_methods_and_ablations(tmp_path):
    small = dict(steps=1, batch=8, width=8, device="cpu")
    train("digits-40", out=tmp_path / "run", method="fixmatch", mu=1, ablate=["no-alignment", "k=4"], **small)
    expected = ablate(with_method(preset("digits-40"), "fixmatch"), "no-alignment", "k=4")
    assert load_config(tmp_path / "run" / "config.json") == dataclasses.replace(expected, mu=1, **small)


def test_runs_of_other_methods_have_their_own_folders_and_no_published_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = preset("cifar10-250")
    assert str(default_folder(config, resume=False)) == "runs/cifar10-250-seed0"
    assert str(default_folder(with_method(config, "fixmatch"), resume=False)) == "runs/cifar10-250-fixmatch-seed0"
    assert str(default_folder(preset("digits-40-supervised"), resume=False)) == "runs/digits-40-supervised-seed0"
    assert _published(config, 94.0)["paper_error"] == 6.27 and not _published(with_method(config, "fixmatch"), 94.0)

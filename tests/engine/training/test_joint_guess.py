"""`--guess-pass joint`: pseudo-labels from the training pass, against a second implementation in double precision.

The reference is written from the specification: one pass of a network in training mode over the training inputs and,
after them, the unmixed views that pseudo-labels are made from. Targets are constants, computed from the last logits.
The loss is a function of the first ones, and its gradient that of autograd.
"""

import copy
import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.config.checks import validate
from engine.config.methods import ablate, with_method
from engine.distributed import collectives
from engine.errors import UserError
from engine.method.batch_layout import rank_plan
from engine.training import ranges
from engine.training.feed import plan_spec, rank_layout
from engine.training.state import make_state
from engine.training.step import METRICS, Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.data.cache import DataSet
from pipelines.plan import make_plan
from tests import processes
from tests.processes import assert_close, assert_same_bits, free_port
from tests.running_statistics import statistics_of_first_samples

CLASSES, START = 5, 40
CPU = torch.device("cpu")
LOSSES = ("loss_x", "loss_u", "loss_u1", "loss_rot", "loss")


@pytest.fixture
def joint(tiny):
    """Make small configurations of a method in double precision with a joint guess."""

    def make(method="remixmatch", *ablations, **changes):
        base = with_method(tiny(precision="fp64", ramp_kimg=1.0, bn_momentum=0.1), method)
        return dataclasses.replace(ablate(base, "joint-guess", *ablations), **changes)

    return make


class Bench:
    """One step of a rank on random views, with its gradients, and what the reference needs."""

    def __init__(self, config, rank=0, ranks=1):
        validate(config, ranks)
        rng = torch.Generator().manual_seed(3)
        images = np.zeros((60, 8, 8, 3), np.uint8)
        data = DataSet("made up", tuple("abcde"), images, np.arange(60) % CLASSES, images[:1], np.zeros(1, np.int64))
        self.config, self.spec = config, plan_spec(config, data, np.arange(20))
        self.plan = make_plan(self.spec, 0, START, initial_weights())
        self.labels = np.random.default_rng(1).integers(CLASSES, size=config.batch)
        self.state = state = make_state(config, CLASSES, CPU)
        for p in [*state.network.parameters(), *state.ema_model.parameters()]:
            p.data += 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
        state.targets.p_model_history.copy_(torch.rand(128, CLASSES, generator=rng).softmax(-1))
        state.targets.label_marginal.copy_(torch.rand(CLASSES, generator=rng).softmax(-1))
        state.step.fill_(START)
        self.before = copy.deepcopy(state)
        size = (config.batch * self.spec.blocks, 8, 8, 3)
        self.views = torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
        self.layout = rank_layout(config, self.spec, rank, ranks)
        self.step = Step(config, state, self.layout, torch.float64)

    def run(self, keep_gradients=True):
        """Train the step, by default without changing the parameters. Returns its metrics."""
        if keep_gradients:
            self.state.optimizer.step = self.state.optimizer.zero_grad = lambda: None
        views = self.views[self.layout.step_views(self.plan)]
        output = self.step(StepInput.pack(views, rank_plan(self.layout, self.plan, self.labels), CPU))
        return dict(zip(METRICS, output.metrics.tolist(), strict=True))

    def gradients(self):
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.state.network.parameters()]


class Reference:
    """The step of a joint guess by its formulas, for micro-batches that are trained side by side, one per rank.

    Attributes:
        network: The network before the step; `loss.backward()` accumulates its gradients.
        terms: The loss and its terms, means over the micro-batches.
        passes: Images of each pass, (N, 3, 8, 8): trained ones, then those that pseudo-labels are made from.
        q: Predictions of the views, averaged over the views of an image, (U, L).
        targets: Mixed targets of the pool.
    """

    def __init__(self, bench, micro_batches=1):
        self.bench, self.c = bench, bench.config
        self.network = copy.deepcopy(bench.before.network)
        c, plan, batch, unlabeled = self.c, bench.plan, self.c.batch, self.c.mu * self.c.batch
        x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2)
        views_per_image = c.k + (c.anchor != "none")
        labeled, *of_u = x[: batch + views_per_image * unlabeled].split([batch] + [unlabeled] * views_per_image)
        first_strong = 0 if c.anchor == "none" else 1
        pooled = of_u[1:] if c.anchor == "guess-only" else of_u
        guessed = pooled if c.guess == "mean" else of_u[:1]
        pool = torch.cat([labeled, *pooled])
        lam, perm = torch.tensor(plan.lam).double(), torch.tensor(plan.perm)
        wide = lam[:, None, None, None]
        mixed = wide * pool + (1 - wide) * pool[perm]
        u_1 = of_u[first_strong]

        # Micro-batch m has the images m, m + M, ... of every block.
        def part(images, m):
            return images[m::micro_batches]

        self.passes, outputs, guesses = [], [], []
        for m in range(micro_batches):
            blocks = [part(mixed[:batch], m), *(part(block, m) for block in mixed[batch:].split(unlabeled))]
            turns = part(torch.tensor(plan.rotations), m)
            turned = [torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(part(u_1, m), turns, strict=True)]
            extra = [part(u_1, m)] * (c.w_u1 > 0) + ([torch.stack(turned)] if c.w_rot else [])
            trained = torch.cat([*blocks, *extra])
            whole = torch.cat([trained, *(part(block, m) for block in guessed)])
            self.passes.append((whole, sum(map(len, blocks))))
            logits, rotation_logits = self.network(whole)
            outputs.append((logits[: len(trained)], rotation_logits[: len(trained)], turns))
            guesses.append(logits[len(trained) :].detach().softmax(-1).unflatten(0, (len(guessed), -1)).mean(0))

        self.q = torch.empty(unlabeled, CLASSES, dtype=torch.double)
        for m, q in enumerate(guesses):
            self.q[m::micro_batches] = q
        pseudo_labels, used = self._pseudo_labels()
        known = torch.cat([F.one_hot(torch.tensor(bench.labels), CLASSES).double()] + [pseudo_labels] * len(pooled))
        weight = torch.cat([torch.ones(batch).double()] + [used] * len(pooled))[:, None]
        self.targets = lam[:, None] * weight * known + (1 - lam[:, None]) * (weight * known)[perm]

        losses = [self._losses(*output, pseudo_labels, m, micro_batches) for m, output in enumerate(outputs)]
        self.terms = {name: sum(each[name] for each in losses) / micro_batches for name in LOSSES}

    def _pseudo_labels(self):
        """Apply alignment, sharpening and threshold: (U, L), and a weight per image."""
        c, before, q = self.c, self.bench.before.targets, self.q
        used = (q.amax(-1) >= c.threshold).double()
        if c.align:
            q = q * (before.label_marginal.double() + 1e-6) / (before.p_model_history.double().mean(0) + 1e-6)
            q = q / q.sum(-1, keepdim=True)
        if c.hard_labels:
            return F.one_hot(q.argmax(-1), CLASSES).double(), used
        sharp = q ** (1 / c.temperature)
        return sharp / sharp.sum(-1, keepdim=True), used

    def _losses(self, logits, rotation_logits, turns, pseudo_labels, m, micro_batches):
        c, batch = self.c, self.c.batch
        ramp = min(1.0, START * batch / 1024 / c.ramp_kimg) if c.ramp_kimg else 1.0
        own_batch, own_u = batch // micro_batches, c.mu * batch // micro_batches
        blocks = [self.targets[:batch], *self.targets[batch:].split(c.mu * batch)]
        targets = torch.cat([block[m::micro_batches] for block in blocks])
        log_p = logits.log_softmax(-1)
        cross_entropy = -(targets * log_p[: len(targets)]).sum(-1)
        of_u, targets_u = slice(own_batch, len(targets)), targets[own_batch:]
        if c.unlabeled_loss == "l2":
            loss_u = (log_p[of_u].exp() - targets_u).square().mean()
        elif c.unlabeled_loss == "kl":
            loss_u = F.kl_div(log_p[of_u], targets_u, reduction="sum") / len(targets_u)
        else:
            loss_u = cross_entropy[of_u].mean()
        loss_x = cross_entropy[:own_batch].mean()
        own = pseudo_labels[m::micro_batches]
        zero = torch.zeros(()).double()
        loss_u1 = -(own * log_p[len(targets) :][:own_u]).sum(-1).mean() if c.w_u1 else zero
        loss_rot = F.cross_entropy(rotation_logits[-own_u:], turns) if c.w_rot else zero
        loss = loss_x + ramp * (c.w_u * loss_u + c.w_u1 * loss_u1) + c.w_rot * loss_rot
        return dict(zip(LOSSES, (loss_x, loss_u, loss_u1, loss_rot, loss), strict=True))

    def check(self, metrics):
        """Compare the losses, the gradients and the history of p~(y) with those of the step."""
        # Metrics and targets are float32.
        for name in LOSSES:
            assert metrics[name] == pytest.approx(self.terms[name].item(), rel=1e-5, abs=1e-6), name
        self.terms["loss"].backward()
        for mine, p in zip(self.bench.gradients(), self.network.parameters(), strict=True):
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
        history = self.bench.state.targets.p_model_history[START]
        torch.testing.assert_close(history.double(), self.q.mean(0), rtol=1e-5, atol=1e-6)


CASES = {
    "remixmatch": ("remixmatch",),
    "mean-guess": ("remixmatch", "mean-guess"),
    "no-premixup, no-rotation": ("remixmatch", "no-premixup", "no-rotation"),
    "mixmatch": ("mixmatch",),
    "fixmatch": ("fixmatch", "k=2"),
    "uda": ("uda",),
    "pseudo-label": ("pseudo-label",),
}
CHANGES = {"fixmatch": dict(mu=3, threshold=0.5), "uda": dict(mu=2, threshold=0.5), "pseudo-label": dict(threshold=0.5)}


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_a_joint_guess(joint, case):
    bench = Bench(joint(*CASES[case], **CHANGES.get(case, {})))
    reference = Reference(bench)
    metrics = bench.run()
    reference.check(metrics)
    separate = Bench(dataclasses.replace(bench.config, guess_pass="separate")).run()
    assert separate["loss"] != pytest.approx(metrics["loss"], rel=1e-4), "the guess changes the statistics of others"
    if bench.config.threshold:
        assert 0 < metrics["guesses_used"] < 1, "the threshold is only tested with pseudo-labels on both sides of it"


def test_the_gradient_includes_what_u_weak_contributes_to_the_statistics(joint):
    """Compare with differences of the loss at constant targets, which moves u_weak's activations along."""
    bench = Bench(joint())
    bench.run()
    reference = Reference(bench)
    targets, (images, _) = reference.targets, reference.passes[0]
    pseudo_labels, _ = reference._pseudo_labels()
    turns = torch.tensor(bench.plan.rotations)
    rng = torch.Generator().manual_seed(0)
    network = copy.deepcopy(bench.before.network)
    directions = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in network.parameters()]
    trained = len(images) - bench.config.batch

    @torch.no_grad()
    def loss(distance, guesses):
        moved = copy.deepcopy(network)
        for p, direction in zip(moved.parameters(), directions, strict=True):
            p += distance * direction
        logits, rotation_logits = moved(images[: trained + guesses])
        reference.targets = targets
        return reference._losses(logits[:trained], rotation_logits[:trained], turns, pseudo_labels, 0, 1)["loss"].item()

    step = 1e-6
    slopes = {guesses: (loss(step, guesses) - loss(-step, guesses)) / (2 * step) for guesses in (0, bench.config.batch)}
    slope = sum((g * d).sum().item() for g, d in zip(bench.gradients(), directions, strict=True))
    assert slope == pytest.approx(slopes[bench.config.batch], rel=1e-5)
    assert slope != pytest.approx(slopes[0], rel=1e-2)


@pytest.mark.parametrize("changes", [dict(), dict(bn="split", bn_groups=2), dict(bn="sync")], ids=str)
@pytest.mark.parametrize("bn_stats", ["all", "pool"])
def test_running_statistics(joint, bn_stats, changes):
    """With `all` the views of the guess update them like all samples of the pass; with `pool` they do not."""
    config = joint(bn_stats=bn_stats, **changes)
    bench = Bench(config)
    images, pool = Reference(bench).passes[0]
    if config.bn == "split":  # The order of the samples defines the groups.
        size = config.batch // config.bn_groups
        order = np.arange(config.batch).reshape(-1, config.bn_groups).T.reshape(-1)
        rest = images[pool:].unflatten(0, (-1, config.batch))[:, order].flatten(0, 1)
        assert len(rest) % size == 0
        images = torch.cat([images[:pool][bench.layout.pool], rest])
    updating = pool if bn_stats == "pool" else len(images)
    expected = statistics_of_first_samples(bench.before.network, images, updating, config.bn_momentum)
    bench.run()
    statistics = bench.state.network.running_statistics()
    torch.testing.assert_close(statistics, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(bench.state.ema_model.running_statistics(), statistics)


def test_with_split_batch_norm_the_guess_is_a_group_of_its_own(joint):
    """Then a joint guess equals a separate one, which normalizes the same groups in a pass of their own."""
    config = joint(bn="split", bn_groups=2, bn_stats="pool")
    one, other = Bench(config), Bench(dataclasses.replace(config, guess_pass="separate"))
    for _ in range(3):
        metrics = [bench.run(keep_gradients=False) for bench in (one, other)]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    for mine, theirs in zip(one.state.tensors(), other.state.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def _compare_two_ranks(config):
    """Train a step on this rank of two and compare it with the reference, which has a pass per rank."""
    torch.set_num_threads(1)
    collectives.start(CPU, timeout=60)
    bench = Bench(config, collectives.rank(), collectives.ranks())
    metrics = bench.run()
    reference = Reference(bench, micro_batches=2)
    reference.check(metrics)
    updating = [pool if config.bn_stats == "pool" else len(images) for images, pool in reference.passes]
    network, momentum = bench.before.network, config.bn_momentum
    statistics = [
        statistics_of_first_samples(network, images, first, momentum)
        for (images, _), first in zip(reference.passes, updating, strict=True)
    ]
    found = bench.state.network.running_statistics()
    torch.testing.assert_close(found, sum(statistics) / 2, atol=1e-6, rtol=1e-6)
    collectives.stop()


@pytest.mark.parametrize("case", ["remixmatch", "mixmatch"])
def test_the_step_of_two_ranks(joint, case, tmp_path):
    """Each rank has a pass of its own, and their predictions are exchanged before the loss."""
    config, log = joint(*CASES[case], bn_stats="pool" if case == "remixmatch" else "all"), tmp_path / "log"
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(processes.call, log, _compare_two_ranks, config, RANK=r, LOCAL_RANK=r, **group)
                 for r in range(2)]  # fmt: skip
    assert [rank.result() for rank in ranks] == [0, 0], log.read_text()


FLAGS = [
    *("--precision", "fp64", "--device", "cpu", "--quiet", "--ablate", "joint-guess", "--bn-momentum", "0.1"),
    *("--eval-every", "2", "--log-every", "1", "--batch", "8", "--width", "8", "--checkpoint-every", "2"),
]


def test_two_ranks_with_synchronized_batch_norm_equal_one(tmp_path):
    flags = (*FLAGS, "--bn-stats", "pool", "--steps", 4)
    one = processes.train(tmp_path / "one", 1, *flags)
    assert_close(one, processes.train(tmp_path / "two", 2, *flags, "--bn", "sync", "--check-ranks", 1))


def test_a_run_resumes_bitwise(tmp_path):
    one = processes.train(tmp_path / "one", 1, *FLAGS, "--steps", 4)
    for steps in (2, 4):  # Multiples of --eval-every, since the last step is evaluated, too.
        processes.train(tmp_path / "resumed", 1, *FLAGS, "--steps", steps, "--resume")
    assert_same_bits(one, tmp_path / "resumed")


def test_a_joint_guess_has_no_range_of_its_own(joint):
    entered = {}
    for guess_pass in ("separate", "joint"):
        bench, names = Bench(joint(guess_pass=guess_pass)), []
        with ranges.listening(names.append):
            bench.run()
        entered[guess_pass] = Counter(filter(None, names))
    assert entered["separate"] - entered["joint"] == {"guess": 1}
    assert not entered["joint"] - entered["separate"]


def test_supervised_training_has_no_guess(joint):
    both = [Bench(joint("supervised", guess_pass=value, micro_batches=2)) for value in ("separate", "joint")]
    assert both[0].run(False) == both[1].run(False)
    for one, other in zip(*(bench.state.tensors() for bench in both), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("micro_batches", "ranks"), [(2, 1), (4, 2)])
def test_several_micro_batches_per_rank_are_refused(joint, micro_batches, ranks):
    config = joint(micro_batches=micro_batches)
    message = f"--guess-pass joint needs .*, but --micro-batches {micro_batches} trains them one after another"
    with pytest.raises(UserError, match=message):
        validate(config, ranks)
    validate(config, micro_batches)
    validate(dataclasses.replace(config, guess_pass="separate"), ranks)


@pytest.mark.compiler
@pytest.mark.long
def test_a_compiled_step_agrees_with_an_eager_one(joint):
    torch._dynamo.reset()
    config = joint(scales=1, blocks=1, precision="fp32")
    eager, compiled = Bench(config), Bench(config)
    eager.step = Step(config, eager.state, eager.layout, torch.float32)
    compiled.step = Step(config, compiled.state, compiled.layout, torch.float32, compiled=True)
    assert compiled.run() == pytest.approx(eager.run(), rel=1e-4, abs=1e-5)
    for mine, theirs in zip(eager.gradients(), compiled.gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)

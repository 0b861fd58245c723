"""The training step against a second implementation of Algorithm 1, with plain loops and formulas."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.method.batch_layout import rank_plan
from engine.method.losses import LOSSES
from engine.method.targets import P_MODEL_STEPS
from engine.training.feed import rank_layout
from engine.training.state import decayed_parameters, make_state
from engine.training.step import METRICS, Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.plan import PlanSpec, make_plan
from tests.running_statistics import statistics_of_first_samples

CLASSES = 5
CPU = torch.device("cpu")


class Bench:
    """A step with random views, and everything that the reference implementation needs."""

    def __init__(self, config, start=0):
        self.config = config
        self.spec = PlanSpec(
            config.batch, config.k, 20, 50 if config.unlabeled else 0, max_shift=1, flip=False, mixup_alpha=0.75
        )
        self.layout = rank_layout(config, self.spec, 0, 1)
        self.state = make_state(config, CLASSES, CPU)
        # Random network and marginals, since many errors would cancel in the initial state.
        rng = torch.Generator().manual_seed(1)
        for p in [*self.state.network.parameters(), *self.state.ema_model.parameters()]:
            p.data += 0.1 * torch.randn(p.shape, generator=rng)
        self.state.targets.p_model_history.copy_(torch.rand(P_MODEL_STEPS, CLASSES, generator=rng).softmax(-1))
        self.state.targets.label_marginal.copy_(torch.rand(CLASSES, generator=rng).softmax(-1))
        self.state.step.fill_(start)
        self.plan = make_plan(self.spec, 0, start, initial_weights())
        self.labels = np.random.default_rng(start).integers(CLASSES, size=config.batch)
        size = (config.batch * self.spec.blocks, 8, 8, 3)
        self.views = torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
        self.step = Step(config, self.state, self.layout, torch.float32)

    def run(self):
        data = StepInput.pack(self.views[self.layout.views], rank_plan(self.layout, self.plan, self.labels), CPU)
        return self.step(data)


def reference(bench):
    """Compute Algorithm 1 of the paper; return the expected losses, omega and state."""
    c, plan, before = bench.config, bench.plan, copy.deepcopy(bench.state)
    batch, step = c.batch, int(before.step)
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2).float()
    one_hot = np.eye(CLASSES)[bench.labels]
    expected = {}

    network = before.network
    network.group_size = None
    frozen = copy.deepcopy(network)

    # Label guessing, distribution alignment, sharpening.
    if c.unlabeled:
        q = frozen(x[batch : 2 * batch])[0].softmax(-1).detach().double().numpy()
        p, p_model = (
            before.targets.label_marginal.double().numpy(),
            before.targets.p_model_history.double().numpy().mean(0),
        )
        pseudo_labels = np.empty_like(q)
        for i in range(batch):
            aligned = q[i] * (p + 1e-6) / (p_model + 1e-6) if c.align else q[i]
            aligned = aligned / aligned.sum()
            sharp = aligned ** (1 / c.temperature)
            pseudo_labels[i] = sharp / sharp.sum()
        p_model_history = before.targets.p_model_history.double().numpy().copy()
        p_model_history[step % 128] = q.mean(0)
        expected["p_model_history"] = p_model_history
        expected["confidence"] = np.mean([max(each) for each in pseudo_labels])
        pool_targets = np.concatenate([one_hot] + [pseudo_labels] * (c.k + 1))
    else:
        pool_targets = one_hot
        p, p_model_history = (
            each.double().numpy() for each in (before.targets.label_marginal, before.targets.p_model_history)
        )
        expected["confidence"] = 1.0  # Of the labels.
    # Total variation distance of p(y) before the step and p~(y) with its predictions.
    expected["alignment_gap"] = sum(abs(a - b) for a, b in zip(p, p_model_history.mean(0), strict=True)) / 2
    expected["label_marginal"] = 0.999 * before.targets.label_marginal.double().numpy() + 0.001 * one_hot.mean(0)

    # Mixup.
    images, targets = [], []
    for i in range(len(pool_targets)):
        lam = float(plan.lam[i])
        images.append(lam * x[i] + (1 - lam) * x[plan.perm[i]])
        targets.append(lam * pool_targets[i] + (1 - lam) * pool_targets[plan.perm[i]])
    images, targets = torch.stack(images), torch.tensor(np.array(targets)).float()

    # CTAugment's probes, on f_ema in evaluation mode.
    probes = before.ema_model(x[-batch:])[0].softmax(-1).double().numpy()
    expected["omega"] = 1 - 0.5 * np.abs(probes - one_hot).sum(-1)

    # Losses, in one joint pass.
    def cross_entropy(logits, t):
        return -(t * logits.log_softmax(-1)).sum(-1).mean()

    if c.unlabeled:
        first = x[2 * batch : 3 * batch]
        rotated = torch.stack([torch.rot90(first[i], int(plan.rotations[i]), (1, 2)) for i in range(batch)])
        logits, rotation_logits = network(torch.cat([images, first, rotated]))
        pool = len(images)
        ramp = min(1.0, step * batch / 1024 / c.ramp_kimg)
        loss_x = cross_entropy(logits[:batch], targets[:batch])
        loss_u = cross_entropy(logits[batch:pool], targets[batch:])
        loss_u1 = cross_entropy(logits[pool : pool + batch], torch.tensor(pseudo_labels).float())
        loss_rot = F.cross_entropy(rotation_logits[pool + batch :], torch.tensor(plan.rotations))
        loss = loss_x + c.w_u * ramp * loss_u + c.w_u1 * ramp * loss_u1 + c.w_rot * loss_rot
        terms = [loss, loss_x, loss_u, loss_u1, loss_rot, torch.zeros(())]
    else:
        loss = cross_entropy(network(images)[0], targets)
        terms = [loss, loss, *[torch.zeros(())] * 4]
    expected["losses"] = [t.item() for t in terms]

    # Update: decoupled weight decay, and Adam's first step written out. Then the exponential moving average.
    loss.backward()
    expected["parameters"], expected["ema_model"] = {}, {}
    for (name, p), a in zip(network.named_parameters(), before.ema_model.parameters(), strict=True):
        new = p.data.double()
        if p.grad is not None:
            if p.ndim > 1:
                new = new * (1 - 0.02 * 0.002)
            g = p.grad.double()
            new = new - 0.002 * g / (g.abs() + 1e-8)
        expected["parameters"][name] = new
        expected["ema_model"][name] = c.ema_decay * a.data.double() + (1 - c.ema_decay) * new
    expected["buffers"] = dict(network.named_buffers())
    return expected


@pytest.mark.parametrize("start", [0, 37, 4000])
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(k=5, w_rot=2.0, w_u1=1.0), dict(align=False, temperature=1.0), dict(method="supervised")],
    ids=lambda changes: ",".join(changes) or "remixmatch",
)
def test_step_computes_algorithm_1(tiny, changes, start):
    bench = Bench(tiny(**changes), start)
    expected = reference(bench)
    output = bench.run()
    state = bench.state
    metrics = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    np.testing.assert_allclose([metrics[m] for m in LOSSES], expected["losses"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.omega.numpy(), expected["omega"], atol=1e-5)
    for name, value in {"omega": expected["omega"].mean(), "guesses_used": 1.0, "stop": 0.0}.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    for name in ("confidence", "alignment_gap"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    np.testing.assert_allclose(state.targets.label_marginal.numpy(), expected["label_marginal"], atol=1e-6)
    if "p_model_history" in expected:
        np.testing.assert_allclose(state.targets.p_model_history.numpy(), expected["p_model_history"], atol=1e-6)
    for name, p in state.network.named_parameters():
        # Adam's first step is the sign of the gradient, which rounding can flip if the gradient is near 0.
        error = (p.double() - expected["parameters"][name]).abs()
        assert (error > 1e-5).double().mean() < 0.02, name
        assert error.max() < 2 * 0.002 + 1e-5, name
    for name, p in state.ema_model.named_parameters():
        assert ((p.double() - expected["ema_model"][name]).abs() > 1e-6).double().mean() < 0.02, name
    for name, buffer in state.network.named_buffers():
        torch.testing.assert_close(buffer, expected["buffers"][name], atol=1e-5, rtol=1e-4)
        assert torch.equal(buffer, dict(state.ema_model.named_buffers())[name])
    assert int(state.step) == start + 1


def test_ramp_rises_linearly_over_ramp_kimg(tiny):
    config = tiny(ramp_kimg=1.0, w_rot=0.0, w_u1=0.0, w_u=1.0)  # 128 steps of 8 labeled images.
    for start, ramp in [(0, 0.0), (32, 0.25), (127, 127 / 128), (128, 1.0), (5000, 1.0)]:
        metrics = dict(zip(METRICS, Bench(config, start).run().metrics.tolist(), strict=True))
        assert metrics["loss"] == pytest.approx(metrics["loss_x"] + ramp * metrics["loss_u"], rel=1e-5)


def test_p_model_history_starts_uniform_and_replaces_the_oldest_of_128_steps(tiny):
    bench = Bench(tiny())
    fresh = make_state(bench.config, CLASSES, CPU)
    assert fresh.targets.p_model_history.shape == (128, CLASSES) and torch.equal(
        fresh.targets.p_model_history, torch.full((128, CLASSES), 0.2)
    )
    assert torch.equal(fresh.targets.label_marginal, torch.full((CLASSES,), 0.2))
    bench.state.targets.p_model_history.fill_(0.2)
    for step in (0, 1, 127, 128):
        bench.state.step.fill_(step)
        before = bench.state.targets.p_model_history.clone()
        bench.run()
        changed = (bench.state.targets.p_model_history != before).any(1).nonzero().flatten().tolist()
        assert changed == [step % 128]


def test_a_given_class_distribution_does_not_change(tiny):
    given = (0.4, 0.3, 0.1, 0.1, 0.1)
    bench = Bench(tiny(class_distribution=given))
    assert make_state(bench.config, CLASSES, CPU).targets.label_marginal.tolist() == pytest.approx(given)
    before = bench.state.targets.label_marginal.clone()
    bench.run()
    assert torch.equal(bench.state.targets.label_marginal, before)


def test_only_weights_of_convolutions_and_linear_layers_decay(tiny):
    network = make_state(tiny(), CLASSES, CPU).network
    decayed, not_decayed = decayed_parameters(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in decayed} == {"weight"}
    assert all("conv" in n or "stem" in n or "head" in n or "shortcut" in n for n in (names[id(p)] for p in decayed))
    assert all("norm" in n or n.endswith("bias") for n in (names[id(p)] for p in not_decayed))
    assert len(decayed) + len(not_decayed) == len(names)


def test_pseudo_labels_use_the_network_and_probes_the_ema_model(tiny):
    first, second, third = Bench(tiny()), Bench(tiny()), Bench(tiny())
    with torch.no_grad():
        second.state.ema_model.head.bias += torch.arange(CLASSES)
        third.state.network.head.bias += torch.arange(CLASSES)
    a, b, c = first.run(), second.run(), third.run()
    assert torch.equal(a.metrics[: len(LOSSES)], b.metrics[: len(LOSSES)]) and not torch.equal(a.omega, b.omega)
    assert torch.equal(first.state.targets.p_model_history, second.state.targets.p_model_history)
    assert torch.equal(a.omega, c.omega) and not torch.equal(
        first.state.targets.p_model_history, third.state.targets.p_model_history
    )


def test_split_batch_norm_equals_separate_passes(tiny):
    """Compare one pass over groups with a pass per group of the interleaved pool and of the rotated u_1."""
    config = tiny(bn="split", bn_groups=2)
    bench = Bench(config)
    network = copy.deepcopy(bench.state.network)
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2).float()
    plan, batch = bench.plan, config.batch
    lam = torch.from_numpy(plan.lam)[:, None, None, None]
    mixed = lam * x[: 4 * batch] + (1 - lam) * x[plan.perm]
    logits = torch.empty(4 * batch, CLASSES)
    for group in bench.layout.pool.reshape(-1, batch // 2):
        logits[group] = network(mixed[group])[0].detach()
    first = x[2 * batch : 3 * batch]
    rotation_logits = torch.empty(batch, 4)
    for part in (0, 1):
        rotated = torch.stack([torch.rot90(first[i], int(plan.rotations[i]), (1, 2)) for i in range(part, batch, 2)])
        rotation_logits[part::2] = network(rotated)[1].detach()
    metrics = dict(zip(METRICS, bench.run().metrics.tolist(), strict=True))
    expected = F.cross_entropy(rotation_logits, torch.tensor(plan.rotations)).item()
    assert metrics["loss_rot"] == pytest.approx(expected, rel=1e-4)
    targets = np.eye(CLASSES)[bench.labels]
    assert any(plan.perm[:batch] < batch), "some labeled samples are mixed with labeled samples"
    known = np.concatenate([targets] + [reference_pseudo_labels(bench, x)] * 3)
    soft = plan.lam[:, None] * known + (1 - plan.lam[:, None]) * known[plan.perm]
    loss = -(torch.tensor(soft[:batch]).float() * logits[:batch].log_softmax(-1)).sum(-1).mean().item()
    assert metrics["loss_x"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("method", ["remixmatch", "supervised"])
def test_micro_batches_of_whole_groups_equal_one_pass_over_groups(tiny, method):
    config = tiny(bn="split", bn_groups=4, micro_batches=1, batch=16, method=method, precision="fp64")
    whole, parts = Bench(config), Bench(dataclasses.replace(config, micro_batches=2))
    for bench in (whole, parts):
        bench.step = Step(bench.config, bench.state, bench.layout, torch.float64)
    for _ in range(2):
        outputs = whole.run(), parts.run()
        torch.testing.assert_close(*(output.metrics for output in outputs), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(*(output.omega for output in outputs), atol=1e-6, rtol=1e-6)
        tensors = (bench.state.network.state_dict() for bench in (whole, parts))
        for (name, one), other in zip(next(tensors).items(), next(tensors).values(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)


def test_micro_batches_have_separate_batch_statistics(tiny):
    """With batch norm over the whole pass, micro-batches change the result."""
    whole, parts = Bench(tiny()), Bench(tiny(micro_batches=2))
    one, other = whole.run().metrics[0], parts.run().metrics[0]
    assert one != other and one == pytest.approx(other.item(), rel=0.1)


def pool_statistics(bench):
    """Compute the running statistics after a step in which only the mixup pool updates them."""
    c, plan, batch = bench.config, bench.plan, bench.config.batch
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2)
    lam, pool = torch.from_numpy(plan.lam).double()[:, None, None, None], batch * bench.spec.pool_blocks
    mixed = lam * x[:pool] + (1 - lam) * x[plan.perm]
    groups = c.bn_groups if c.bn == "split" else c.micro_batches
    updated = []
    for part in range(c.micro_batches):
        pool_part = bench.layout.pool.reshape(c.micro_batches, -1)[part]
        trained = mixed[pool_part]
        if c.unlabeled:
            own = np.concatenate([np.arange(group, batch, groups) for group in range(part, groups, c.micro_batches)])
            assert set(pool_part % batch) == set(own)
            first = x[2 * batch + own]
            rotated = [
                torch.rot90(one, int(turn), (1, 2)) for one, turn in zip(first, plan.rotations[own], strict=True)
            ]
            trained = torch.cat([trained, first, torch.stack(rotated)])
        updated.append(statistics_of_first_samples(bench.state.network, trained, len(pool_part), c.bn_momentum))
    return torch.stack(updated).mean(0)  # Micro-batches are averaged like ranks.


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(micro_batches=2),
        dict(micro_batches=4, k=1),
        dict(bn="split", bn_groups=2),
        dict(bn="split", bn_groups=4, batch=16),
        dict(bn="split", bn_groups=4, batch=16, micro_batches=2),
        dict(bn="sync"),
        dict(method="supervised"),
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "joint",
)
def test_running_statistics_of_the_pool(tiny, changes):
    """Only the pool updates them, and the rest of the step is bit-identical."""
    config = tiny(precision="fp64", bn_momentum=0.1, **changes)
    by_all, by_pool = Bench(config), Bench(dataclasses.replace(config, bn_stats="pool"))
    expected = pool_statistics(by_pool)
    for bench in (by_all, by_pool):
        bench.step = Step(bench.config, bench.state, bench.layout, torch.float64)
    a, b = by_all.run(), by_pool.run()
    statistics = by_pool.state.network.running_statistics()
    torch.testing.assert_close(statistics, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(by_pool.state.ema_model.running_statistics(), statistics)
    if config.unlabeled:
        assert (by_all.state.network.running_statistics() - expected).abs().max() > 1e-3
    assert torch.equal(a.metrics, b.metrics) and torch.equal(a.omega, b.omega)
    for one, other in zip(by_all.state.network.parameters(), by_pool.state.network.parameters(), strict=True):
        assert torch.equal(one, other)


def reference_pseudo_labels(bench, x):
    """Compute the pseudo-labels by their formulas, with the network before the step."""
    fresh = Bench(bench.config)
    batch = bench.config.batch
    q = torch.empty(batch, CLASSES)
    for part in (0, 1):
        q[part::2] = fresh.state.network(x[batch + part : 2 * batch : 2])[0].softmax(-1).detach()
    q = (
        q.double().numpy()
        * (fresh.state.targets.label_marginal.numpy() + 1e-6)
        / (fresh.state.targets.p_model_history.numpy().mean(0) + 1e-6)
    )
    q = (q / q.sum(-1, keepdims=True)) ** 2
    return q / q.sum(-1, keepdims=True)


@pytest.mark.parametrize("bn", ["joint", "split"])
def test_ten_steps_learn(tiny, bn):
    """The labeled loss falls by a wide margin when one batch is repeated."""
    bench = Bench(tiny(bn=bn, lr=0.01))
    losses = [bench.run().metrics[1].item() for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_bf16_step_agrees_with_fp32(tiny):
    fp32, bf16 = Bench(tiny()), Bench(tiny())
    bf16.step = Step(bf16.config, bf16.state, bf16.layout, torch.bfloat16)
    a, b = fp32.run().metrics, bf16.run().metrics
    torch.testing.assert_close(a[:5], b[:5], rtol=0.05, atol=0.02)
    assert not torch.equal(a[:5], b[:5])

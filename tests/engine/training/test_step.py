"""The step against the paper's algorithm 1, written out a second time with plain loops and formulas."""

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
    """A step with made-up views, and everything that the reference needs to follow it."""

    def __init__(self, config, start=0):
        self.config = config
        self.spec = PlanSpec(
            config.batch, config.k, 20, 50 if config.unlabeled else 0, max_shift=1, flip=False, mixup_alpha=0.75
        )
        self.rows = rank_layout(config, self.spec, 0, 1)
        self.state = make_state(config, CLASSES, CPU)
        # neither network nor marginals at their start, where much would cancel
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
        self.step = Step(config, self.state, self.rows, torch.float32)

    def run(self):
        data = StepInput.pack(self.views[self.rows.views], rank_plan(self.rows, self.plan, self.labels), CPU)
        return self.step(data)


def reference(bench):
    """The paper's algorithm 1, one image at a time where it says so; returns what should be afterwards."""
    c, plan, before = bench.config, bench.plan, copy.deepcopy(bench.state)
    batch, step = c.batch, int(before.step)
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2).float()
    one_hot = np.eye(CLASSES)[bench.labels]
    expected = {}

    network = before.network
    network.group_size = None
    frozen = copy.deepcopy(network)

    # 2 guess, 3 alignment, 4 sharpening
    if c.unlabeled:
        q = frozen(x[batch : 2 * batch])[0].softmax(-1).detach().double().numpy()
        p, p_model = (
            before.targets.label_marginal.double().numpy(),
            before.targets.p_model_history.double().numpy().mean(0),
        )
        guesses = np.empty_like(q)
        for i in range(batch):
            aligned = q[i] * (p + 1e-6) / (p_model + 1e-6) if c.align else q[i]
            aligned = aligned / aligned.sum()
            sharp = aligned ** (1 / c.temperature)
            guesses[i] = sharp / sharp.sum()
        p_model_history = before.targets.p_model_history.double().numpy().copy()
        p_model_history[step % 128] = q.mean(0)
        expected["p_model_history"] = p_model_history
        pool_targets = np.concatenate([one_hot] + [guesses] * (c.k + 1))
    else:
        pool_targets = one_hot
    expected["label_marginal"] = 0.999 * before.targets.label_marginal.double().numpy() + 0.001 * one_hot.mean(0)

    # 5 mixup, row by row
    images, targets = [], []
    for row in range(len(pool_targets)):
        lam = float(plan.lam[row])
        images.append(lam * x[row] + (1 - lam) * x[plan.perm[row]])
        targets.append(lam * pool_targets[row] + (1 - lam) * pool_targets[plan.perm[row]])
    images, targets = torch.stack(images), torch.tensor(np.array(targets)).float()

    # 9 probes, on f_ema in evaluation mode
    probes = before.ema_model(x[-batch:])[0].softmax(-1).double().numpy()
    expected["omega"] = 1 - 0.5 * np.abs(probes - one_hot).sum(-1)

    # 6 losses; one joint pass
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
        loss_u1 = cross_entropy(logits[pool : pool + batch], torch.tensor(guesses).float())
        loss_rot = F.cross_entropy(rotation_logits[pool + batch :], torch.tensor(plan.rotations))
        loss = loss_x + c.w_u * ramp * loss_u + c.w_u1 * ramp * loss_u1 + c.w_rot * loss_rot
        terms = [loss, loss_x, loss_u, loss_u1, loss_rot]
    else:
        loss = cross_entropy(network(images)[0], targets)
        terms = [loss, loss, torch.zeros(()), torch.zeros(()), torch.zeros(())]
    expected["losses"] = [t.item() for t in terms]

    # 7 update: Adam's first step by hand, then the decoupled decay of weights alone
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
        expected["ema_model"][name] = c.ema_decay * a.data.double() + (1 - c.ema_decay) * new  # 8
    expected["buffers"] = dict(network.named_buffers())
    return expected


@pytest.mark.parametrize("start", [0, 37, 4000])
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(k=5, w_rot=2.0, w_u1=1.0), dict(align=False, temperature=1.0), dict(method="supervised")],
    ids=lambda changes: ",".join(changes) or "remixmatch",
)
def test_step_computes_the_papers_algorithm(tiny, changes, start):
    bench = Bench(tiny(**changes), start)
    expected = reference(bench)
    output = bench.run()
    state = bench.state
    metrics = dict(zip(METRICS, output.metrics.tolist(), strict=True))
    np.testing.assert_allclose([metrics[m] for m in LOSSES], expected["losses"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.omega.numpy(), expected["omega"], atol=1e-5)
    np.testing.assert_allclose(state.targets.label_marginal.numpy(), expected["label_marginal"], atol=1e-6)
    if "p_model_history" in expected:
        np.testing.assert_allclose(state.targets.p_model_history.numpy(), expected["p_model_history"], atol=1e-6)
    for name, p in state.network.named_parameters():
        # a gradient near 0 may change sign with the order of a sum, and Adam's first step is its sign
        moved = (p.double() - expected["parameters"][name]).abs()
        assert (moved > 1e-5).double().mean() < 0.02, name
        assert moved.max() < 2 * 0.002 + 1e-5, name
    for name, p in state.ema_model.named_parameters():
        assert ((p.double() - expected["ema_model"][name]).abs() > 1e-6).double().mean() < 0.02, name
    for name, buffer in state.network.named_buffers():
        torch.testing.assert_close(buffer, expected["buffers"][name], atol=1e-5, rtol=1e-4)
        assert torch.equal(buffer, dict(state.ema_model.named_buffers())[name])
    assert int(state.step) == start + 1


def test_ramp_rises_linearly_over_the_kimg_of_the_configuration(tiny):
    config = tiny(ramp_kimg=1.0, w_rot=0.0, w_u1=0.0, w_u=1.0)  # 128 steps of 8 labeled images
    for start, ramp in [(0, 0.0), (32, 0.25), (127, 127 / 128), (128, 1.0), (5000, 1.0)]:
        metrics = dict(zip(METRICS, Bench(config, start).run().metrics.tolist(), strict=True))
        assert metrics["loss"] == pytest.approx(metrics["loss_x"] + ramp * metrics["loss_u"], rel=1e-5)


def test_ring_starts_uniform_holds_128_steps_and_forgets_the_oldest(tiny):
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


def test_a_given_class_distribution_stays_as_it_is(tiny):
    given = (0.4, 0.3, 0.1, 0.1, 0.1)
    bench = Bench(tiny(class_distribution=given))
    assert make_state(bench.config, CLASSES, CPU).targets.label_marginal.tolist() == pytest.approx(given)
    before = bench.state.targets.label_marginal.clone()
    bench.run()
    assert torch.equal(bench.state.targets.label_marginal, before)


def test_kernels_decay_and_nothing_else_does(tiny):
    network = make_state(tiny(), CLASSES, CPU).network
    kernels, others = decayed_parameters(network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in kernels} == {"weight"}
    assert all("conv" in n or "stem" in n or "head" in n or "shortcut" in n for n in (names[id(p)] for p in kernels))
    assert all("norm" in n or n.endswith("bias") for n in (names[id(p)] for p in others))
    assert len(kernels) + len(others) == len(names)


def test_guess_comes_from_the_live_network_and_probes_from_the_ema_model(tiny):
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


def test_split_batch_norm_is_the_papers_separate_passes(tiny):
    """The losses of one grouped pass against a pass for each group of the interleaved pool, u_1 and rotations."""
    config = tiny(bn="split", bn_groups=2)
    bench = Bench(config)
    network = copy.deepcopy(bench.state.network)
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2).float()
    plan, batch = bench.plan, config.batch
    lam = torch.from_numpy(plan.lam)[:, None, None, None]
    mixed = lam * x[: 4 * batch] + (1 - lam) * x[plan.perm]
    logits = torch.empty(4 * batch, CLASSES)
    for group in bench.rows.pool.reshape(-1, batch // 2):
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
    rows = [i for i in range(batch) if plan.perm[i] < batch]  # labeled rows mixed with labeled rows: known targets
    assert rows, "the plan of this seed has such rows"
    # and the whole labeled loss, with the guesses as the step made them
    guesses = guesses_of(bench, x)
    known = np.concatenate([targets] + [guesses] * 3)
    soft = plan.lam[:, None] * known + (1 - plan.lam[:, None]) * known[plan.perm]
    loss = -(torch.tensor(soft[:batch]).float() * logits[:batch].log_softmax(-1)).sum(-1).mean().item()
    assert metrics["loss_x"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("method", ["remixmatch", "supervised"])
def test_micro_batches_of_whole_groups_are_one_pass_over_groups(tiny, method):
    config = tiny(bn="split", bn_groups=4, micro_batches=1, batch=16, method=method, precision="fp64")
    whole, parts = Bench(config), Bench(dataclasses.replace(config, micro_batches=2))
    for bench in (whole, parts):
        bench.step = Step(bench.config, bench.state, bench.rows, torch.float64)
    for _ in range(2):
        outputs = whole.run(), parts.run()
        torch.testing.assert_close(*(output.metrics for output in outputs), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(*(output.omega for output in outputs), atol=1e-6, rtol=1e-6)
        tensors = (bench.state.network.state_dict() for bench in (whole, parts))
        for (name, one), other in zip(next(tensors).items(), next(tensors).values(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)


def test_micro_batches_have_statistics_of_their_own(tiny):
    """With one batch norm over all rows of a pass, cutting the pass is another computation."""
    whole, parts = Bench(tiny()), Bench(tiny(micro_batches=2))
    one, other = whole.run().metrics[0], parts.run().metrics[0]
    assert one != other and one == pytest.approx(other.item(), rel=0.1)


def pool_statistics(bench):
    """Every batch norm's running statistics after a step in which the pool's rows alone move them, by plain passes."""
    c, plan, batch = bench.config, bench.plan, bench.config.batch
    x = (bench.views.double() / 127.5 - 1).permute(0, 3, 1, 2)
    lam, pool = torch.from_numpy(plan.lam).double()[:, None, None, None], batch * bench.spec.pool_blocks
    mixed = lam * x[:pool] + (1 - lam) * x[plan.perm]
    groups = c.bn_groups if c.bn == "split" else c.micro_batches
    moved = []
    for part in range(c.micro_batches):
        rows = bench.rows.pool.reshape(c.micro_batches, -1)[part]
        trained = mixed[rows]
        if c.unlabeled:
            own = np.concatenate([np.arange(group, batch, groups) for group in range(part, groups, c.micro_batches)])
            assert set(rows % batch) == set(own)
            first = x[2 * batch + own]
            rotated = [
                torch.rot90(one, int(turn), (1, 2)) for one, turn in zip(first, plan.rotations[own], strict=True)
            ]
            trained = torch.cat([trained, first, torch.stack(rotated)])
        moved.append(statistics_of_first_samples(bench.state.network, trained, len(rows), c.bn_momentum))
    return torch.stack(moved).mean(0)  # as over ranks


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
    """They move by the pool's rows alone, and nothing else of the step changes by a bit."""
    config = tiny(precision="fp64", bn_momentum=0.1, **changes)
    every, pool = Bench(config), Bench(dataclasses.replace(config, bn_stats="pool"))
    expected = pool_statistics(pool)
    for bench in (every, pool):
        bench.step = Step(bench.config, bench.state, bench.rows, torch.float64)
    a, b = every.run(), pool.run()
    found = pool.state.network.running_statistics()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(pool.state.ema_model.running_statistics(), found)
    if config.unlabeled:
        assert (every.state.network.running_statistics() - expected).abs().max() > 1e-3
    assert torch.equal(a.metrics, b.metrics) and torch.equal(a.omega, b.omega)
    for one, other in zip(every.state.network.parameters(), pool.state.network.parameters(), strict=True):
        assert torch.equal(one, other)


def guesses_of(bench, x):
    """Guessed labels by the formulas, from the network as it was before the step."""
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
    """Repeating one batch, the labeled loss falls by a wide margin."""
    bench = Bench(tiny(bn=bn, lr=0.01))
    losses = [bench.run().metrics[1].item() for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_bf16_step_agrees_with_fp32_to_its_precision(tiny):
    fp32, bf16 = Bench(tiny()), Bench(tiny())
    bf16.step = Step(bf16.config, bf16.state, bf16.rows, torch.bfloat16)
    a, b = fp32.run().metrics, bf16.run().metrics
    torch.testing.assert_close(a[:5], b[:5], rtol=0.05, atol=0.02)
    assert not torch.equal(a[:5], b[:5])

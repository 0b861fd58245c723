"""Modes (eager, compiled, captured), precisions and optimizers: they train the same up to rounding."""

import contextlib
import gc
import sys
import types
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from engine.distributed import collectives
from engine.errors import UserError
from engine.method.batch_layout import BatchLayout, rank_plan
from engine.training import optimizers
from engine.training.cuda_graph import CapturedStep, Snapshot
from engine.training.execution import pick_mode, pick_precision, pick_views
from engine.training.state import make_state
from engine.training.step import METRICS, Step
from engine.training.step_input import StepInput
from pipelines.ctaugment import initial_weights
from pipelines.plan import PlanSpec, make_plan

CLASSES = 4
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Where a gradient is near 0, Adam turns rounding into updates of full size, so trajectories diverge. The first losses
# must agree closely, and then the mean loss of every 50 steps.
FIRST, STRETCH = 5, 50
TOLERANCE = {torch.float32: (1e-3, 0.03), torch.bfloat16: (0.03, 0.1), torch.float16: (0.01, 0.1)}


def trained(config, mode, steps, device=CPU, precision=torch.float32):
    """Train on synthetic classes; return the metrics, (steps, len(METRICS)), and the final state."""
    spec = PlanSpec(config.batch, config.k, 40, 80, max_shift=1, flip=False)
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1)
    state = make_state(config, CLASSES, device)
    torch._dynamo.reset()  # Otherwise dynamo's limit on recompiles could be reached.
    make = partial(Step, config, state, layout, precision, compiled=mode != "eager")
    step = None
    rng = np.random.default_rng(0)
    classes = rng.integers(CLASSES, size=120)
    patterns = rng.integers(40, 216, size=(CLASSES, 1, 8, 8, 3))[classes, 0]
    images = np.clip(patterns + rng.normal(0, 30, patterns.shape), 0, 255).astype(np.uint8)
    metrics = []
    for number in range(steps):
        plan = make_plan(spec, 0, number, initial_weights())
        views = torch.from_numpy(images[plan.views.image + np.where(plan.views.labeled, 0, 40)]).to(device)
        data = StepInput.pack(views, rank_plan(layout, plan, classes[plan.labeled]), device)
        if step is None:
            step = CapturedStep(make, data) if mode == "graph" else make()
        metrics.append(step(data).metrics.clone())
    return torch.stack(metrics).cpu(), state


def assert_same_trajectory(a, b, precision):
    close, loose = TOLERANCE[precision]
    losses = slice(0, 5)
    torch.testing.assert_close(a[:FIRST, losses], b[:FIRST, losses], rtol=close, atol=close)
    means = [run.unflatten(0, (-1, STRETCH)).mean(1) for run in (a, b)]
    torch.testing.assert_close(*means, rtol=loose, atol=loose)
    assert a[-STRETCH:, METRICS.index("loss_x")].mean() < 0.8 * a[:FIRST, METRICS.index("loss_x")].mean(), "it learned"


@pytest.fixture
def steps(long):
    """Enough steps for a network to learn, a multiple of STRETCH."""
    return 200 if long else 100


@pytest.mark.compiler
def test_compiled_and_eager_agree(tiny, steps):
    # The smallest network, since compiling takes most of the time.
    config = tiny(scales=1, batch=8)
    eager, _ = trained(config, "eager", steps)
    compiled, _ = trained(config, "compile", steps)
    assert_same_trajectory(eager, compiled, torch.float32)


def test_fp16_with_loss_scaling_agrees_with_fp32(tiny):
    # A few steps of the smallest network, since CPUs emulate fp16 arithmetic slowly.
    config = tiny(scales=1)
    fp32, _ = trained(config, "eager", FIRST)
    fp16, state = trained(tiny(scales=1, precision="fp16"), "eager", FIRST, precision=torch.float16)
    torch.testing.assert_close(fp32[:, :5], fp16[:, :5], rtol=0.01, atol=0.01)
    assert state.scaler.is_enabled() and not torch.equal(fp32, fp16)


def test_an_overflow_reduces_the_loss_scale_and_skips_the_update(tiny):
    config = tiny(scales=1, precision="fp16")
    _, state = trained(config, "eager", 1, precision=torch.float16)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**126})
    restored = make_state(config, CLASSES, CPU)
    restored.load_state_dict(state.state_dict())
    before = [p.detach().clone() for p in state.network.parameters()]
    loss = state.network(torch.randn(8, 3, 8, 8))[0].square().sum()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    assert state.scaler.get_scale() == 2.0**125
    assert all(torch.equal(p, b) for p, b in zip(state.network.parameters(), before, strict=True))
    assert restored.scaler.get_scale() == 2.0**126, "the scale is part of the state"


def test_a_snapshot_restores_every_tensor_in_place(tiny):
    config = tiny(scales=1, precision="fp16")
    for steps_before in (0, 1):
        state = make_state(config, CLASSES, CPU)
        if steps_before:
            _, state = trained(config, "eager", steps_before, precision=torch.float16)
        fresh = make_state(config, CLASSES, CPU)
        fresh.load_state_dict(state.state_dict())
        addresses = [p.data_ptr() for p in state.network.parameters()]
        snapshot = Snapshot(state)
        rng = torch.Generator().manual_seed(0)
        for p in state.network.parameters():
            p.grad = torch.empty_like(p).normal_(generator=rng)
        state.scaler.scale(torch.zeros(()))  # Creates the tensor of the scale.
        state.scaler.step(state.optimizer)
        state.targets.p_model_history.fill_(3.0)
        state.step += 1
        state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 8.0})
        snapshot.restore()
        assert [p.data_ptr() for p in state.network.parameters()] == addresses
        assert (
            torch.equal(state.targets.p_model_history, fresh.targets.p_model_history)
            and state.scaler.get_scale() == fresh.scaler.get_scale()
        )
        for a, b in zip(state.network.state_dict().values(), fresh.network.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        moments = state.optimizer.state_dict()["state"].values()
        if steps_before:
            for a, b in zip(moments, fresh.optimizer.state_dict()["state"].values(), strict=True):
                assert all(torch.equal(a[name], b[name]) for name in b)
        else:
            assert moments and all(not tensor.any() for moment in moments for tensor in moment.values())


def test_a_packed_plan_is_one_buffer_of_aligned_parts(tiny):
    config = tiny(batch=5, k=2)
    spec = PlanSpec(config.batch, config.k, 40, 80, max_shift=1, flip=False)
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1, carries_images=True)
    plan = rank_plan(layout, make_plan(spec, 0, 0, initial_weights()), np.arange(5))
    data = StepInput.pack(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), plan, CPU)
    for name, array in vars(plan).items():
        part = getattr(data, name)
        np.testing.assert_array_equal(part.numpy(), array)
        if not part.numel():  # It has no address.
            continue
        offset = part.data_ptr() - data.packed.data_ptr()
        assert offset % 16 == 0 and 0 <= offset < data.packed.numel()


def test_one_copy_of_the_packed_buffer_copies_the_whole_plan(tiny):
    config = tiny()
    spec = PlanSpec(config.batch, config.k, 40, 80, max_shift=1, flip=False)
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1)
    views = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    first, second = (
        StepInput.pack(views, rank_plan(layout, make_plan(spec, 0, step, initial_weights()), labels), CPU)
        for step, labels in enumerate((np.arange(8), np.arange(8)[::-1].copy()))
    )
    static = first.clone()
    static.packed.copy_(second.packed)
    for name in ("source", "partner", "lam", "rotations", "target_index", "partner_target_index", "labels"):
        assert torch.equal(getattr(static, name), getattr(second, name)), name
    assert not torch.equal(first.labels, second.labels), "the cloned input is unchanged"


def test_auto_settings(tiny):
    config, gpu = tiny(), torch.device("cuda", 0)
    assert (pick_mode(config, CPU), pick_mode(config, gpu)) == ("eager", "graph")
    assert (pick_precision(config, CPU), pick_precision(config, gpu)) == (torch.float32, torch.bfloat16)
    assert pick_precision(tiny(precision="fp16"), CPU) is torch.float16
    assert [pick_views(config, device, (32, 32)) for device in (CPU, gpu)] == ["dali", "fused"]
    with pytest.raises(UserError, match="prepare smaller images"):
        pick_views(config, gpu, (4000, 224))
    with pytest.raises(UserError, match="got 300x224; use --views dali"):
        pick_views(config, gpu, (300, 224))
    assert [pick_views(tiny(views="dali"), device, (32, 32)) for device in (CPU, gpu)] == ["dali", "dali-graph"]
    assert pick_views(tiny(views="dali-graph"), CPU, (32, 32)) == "dali-graph"
    assert pick_views(tiny(views="dali"), gpu, (300, 300)) == "dali-graph"
    with pytest.raises(UserError, match=r"--views dali supports images of up to 2048x2048 .* prepare smaller images"):
        pick_views(tiny(views="dali"), gpu, (2049, 32))
    with pytest.raises(UserError, match=r"--views dali-graph .* got 4000x4000; use --views dali"):
        pick_views(tiny(views="dali-graph"), CPU, (4000, 4000))


def test_unsupported_settings_are_errors(tiny, monkeypatch):
    with pytest.raises(UserError, match=r"--mode graph .* requires a GPU"):
        pick_mode(tiny(mode="graph"), CPU)
    with pytest.raises(UserError, match="up to 256x256 pixels, got 324x200"):
        pick_views(tiny(views="fused"), CPU, (324, 200))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        pick_mode(tiny(mode="compile"), CPU)


@pytest.fixture
def apex(monkeypatch):
    """Return a function that installs fake apex modules and a fake apex distribution; by default there are none."""
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, None)

    def install(*names, packaged=True):
        for name in names:
            module = types.ModuleType(name)
            if name == "apex.optimizers":
                module.FusedAdam = torch.optim.Adam
            monkeypatch.setitem(sys.modules, name, module)
        if packaged:
            monkeypatch.setattr(optimizers, "version", lambda name: "0.1")

    return install


def test_apex_problems_are_reported(tiny, apex):
    config = tiny(optimizer="apex")
    for names, packaged, words in [
        ((), False, "apex is not installed; build NVIDIA/apex from source"),
        (("apex",), True, "is not NVIDIA's: pip uninstall apex; build NVIDIA/apex"),
        (("apex", "apex.optimizers"), True, "without its CUDA extensions; build NVIDIA/apex"),
        (("apex", "apex.optimizers", "amp_C"), True, "requires a GPU"),
    ]:
        apex(*names, packaged=packaged)
        with pytest.raises(UserError, match=words):
            make_state(config, CLASSES, CPU)


def test_the_tensors_of_a_graph_live_as_long_as_the_graph(tiny, monkeypatch):
    """The graph refers to the step's tensors by address. The CUDA calls are replaced by no-ops."""
    quiet = contextlib.nullcontext()
    for name, value in {
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: quiet,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "graph": lambda *graph, **options: quiet,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    config = tiny(scales=1)
    state = make_state(config, CLASSES, CPU)
    spec = PlanSpec(config.batch, config.k, 40, 80, max_shift=1, flip=False)
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1)
    plan = rank_plan(layout, make_plan(spec, 0, 0, initial_weights()), np.zeros(config.batch, np.int64))
    views = torch.zeros(config.batch * spec.blocks, 8, 8, 3, dtype=torch.uint8)
    steps = []

    def make():
        step = Step(config, state, layout, torch.float32)
        steps.append(weakref.ref(step))
        return step

    captured = CapturedStep(make, StepInput.pack(views, plan, CPU))
    gc.collect()
    assert steps[0]() is not None
    del captured
    gc.collect()
    assert steps[0]() is None


def test_an_optimizer_keeps_its_device_options_when_loading_a_state():
    """As for a run that was started on a CPU and resumed on a GPU in graph mode."""

    def adam(capturable):
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1, capturable=capturable)

    first, second = adam(False), adam(True)
    first.param_groups[0]["params"][0].grad = torch.ones(3)
    first.step()
    saved = first.state_dict()
    saved["param_groups"][0]["lr"] = torch.tensor(0.05)  # apex stores a tensor.
    optimizers.load_optimizer(second, saved, torch.device("meta"))
    (group,) = second.param_groups
    assert group["capturable"] is True and group["lr"].device.type == "meta"
    (state,) = second.state.values()
    assert state["step"] == 1 and torch.equal(state["exp_avg"], first.state_dict()["state"][0]["exp_avg"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", [pytest.param("compile", marks=pytest.mark.hardware), "graph"])
def test_modes_agree_on_a_gpu(tiny, steps, mode, precision, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # Its rounding errors are a thousand times those of fp32.
    config = tiny(width=16, precision=precision, device="cuda")
    device = torch.device("cuda", 0)
    dtype = pick_precision(config, device)
    eager, _ = trained(config, "eager", steps, device, dtype)
    result, _ = trained(config, mode, steps, device, dtype)
    assert_same_trajectory(eager, result, dtype)


@pytest.mark.gpu
@needs_gpu
def test_a_step_never_synchronizes_with_the_device(tiny):
    config = tiny(device="cuda")
    trained(config, "eager", 2, torch.device("cuda", 0))  # Lazy initialization may synchronize.
    spec = PlanSpec(config.batch, config.k, 40, 80, max_shift=1, flip=False)
    layout = BatchLayout.for_rank(spec, 1, 0, 1, 1)
    device = torch.device("cuda", 0)
    step = Step(config, make_state(config, CLASSES, device), layout, torch.bfloat16)
    plan = make_plan(spec, 0, 0, initial_weights())
    views = torch.zeros(config.batch * spec.blocks, 8, 8, 3, dtype=torch.uint8, device=device)
    data = StepInput.pack(views, rank_plan(layout, plan, np.zeros(config.batch, np.int64)), device)
    step(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_capturing_keeps_the_state(tiny):
    """The first captured step has the losses of the first eager step."""
    config, device = tiny(device="cuda"), torch.device("cuda", 0)
    eager, _ = trained(config, "eager", 2, device)
    captured, state = trained(config, "graph", 2, device)
    torch.testing.assert_close(eager, captured, rtol=1e-3, atol=1e-3)
    assert int(state.step) == 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_a_captured_step_in_a_group_of_one_rank_agrees_with_an_eager_step(tiny, gradients):
    """The graph contains DistributedDataParallel and NCCL's collectives."""
    device = torch.device("cuda", 0)
    alone, _ = trained(tiny(device="cuda"), "eager", 100, device)
    collectives.start(device, timeout=60, alone=True)
    try:
        grouped, _ = trained(tiny(device="cuda", gradients=gradients), "graph", 100, device)
    finally:
        collectives.stop()
    assert_same_trajectory(alone, grouped, torch.float32 if gradients == "fp32" else torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
@pytest.mark.skipif(optimizers.apex_problem() is not None, reason="needs NVIDIA apex, built from source")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_apex_and_torch_agree(tiny, steps, mode):
    device = torch.device("cuda", 0)
    of_torch, _ = trained(tiny(device="cuda"), mode, steps, device)
    of_apex, _ = trained(tiny(device="cuda", optimizer="apex"), mode, steps, device)
    assert_same_trajectory(of_torch, of_apex, torch.float32)

"""`remixmatch bench pipelines`: strong views per second: DALI, the fused kernel, PIL, torchvision and others.

One call of a backend makes `batches` batches of views and starts and ends with none pending, so that no backend works
in the background while another is timed; within a call, backends prefetch. The engine's random numbers are drawn before
the call; the other libraries draw theirs during the call. Every run also measures PIL in a single process, for
comparison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.registry import Bench, Record, Table, quartiles
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.timing import bench_device, ceilings, measure
from pipelines import ctaugment
from pipelines.data.datasets import noise
from pipelines.images import ImageStore
from pipelines.plan import PlanSpec, ViewPlan, make_plan
from pipelines.reference_ctaugment import pil_views

IMAGES, MAX_SHIFT, K = 2048, 4, 8
_LOADER_BATCH = 64


@dataclass(frozen=True)
class Task:
    """Views that a backend has to make.

    Attributes:
        images: (2048, side, side, 3) uint8.
        plans: One per batch, of strong views only.
        device: Target device of the views.
        threads: Number of CPU threads or processes a parallel backend may use.
        closing: Closed at the end; backends register their threads and processes here.
    """

    images: np.ndarray
    plans: Sequence[ViewPlan]
    device: torch.device
    threads: int
    closing: ExitStack = field(default_factory=ExitStack)

    @property
    def batch(self) -> int:
        """Views per batch."""
        return len(self.plans[0].image)


Backend = tuple[Callable[[], Any], str]  # A function that makes every batch of a task and waits, and a description.


def make_task(rows: int, side: int, batches: int, device: torch.device, threads: int) -> Task:
    """Return a task whose plans are those of a training step's strong views of unlabeled images."""
    spec = PlanSpec(rows // K, K, IMAGES, IMAGES, MAX_SHIFT, flip=True)
    strong = np.arange(2 * spec.batch, (K + 2) * spec.batch)
    weights = ctaugment.initial_weights()
    plans = [make_plan(spec, 0, step, weights).views.select(strong) for step in range(batches)]
    return Task(noise(IMAGES, side), plans, device, threads)


def pil(task: Task) -> Backend:
    """Make the same CTAugment views with PIL, one at a time in this process."""

    def run() -> None:
        for plan in task.plans:
            pil_views(task.images[plan.image], plan)

    return run, "CTAugment, PIL, one process"


def _queue(pipeline: Any, task: Task, what: str, prefetch: int) -> Backend:
    """Keep a pipeline that has prepare, submit, collect and close filled to its prefetch depth."""

    def run() -> None:
        for plan in task.plans[:prefetch]:
            pipeline.submit(pipeline.prepare(plan))
        for plan in task.plans[prefetch:]:
            pipeline.collect()
            pipeline.submit(pipeline.prepare(plan))
        for _ in task.plans[:prefetch]:
            pipeline.collect()

    task.closing.callback(pipeline.close)
    return run, what


def _ours(kind: Callable[..., Any], task: Task, what: str, *options: Any, **flags: Any) -> Backend:
    """Keep one of the engine's view pipelines filled; every image is both labeled and unlabeled."""
    every = np.arange(len(task.images))
    pipeline = kind(task.images, every, every, task.batch, MAX_SHIFT, *options, prefetch=2, **flags)
    return _queue(pipeline, task, what, 2)


def _dali(task: Task, threads: int) -> Backend:
    from pipelines.dali import DaliViews

    return _ours(DaliViews, task, f"CTAugment, DALI on the CPU, threads: {threads}", threads)


def _dali_graph(task: Task, device: str) -> Backend:
    from pipelines.dali_graph import DaliGraphViews

    what = f"CTAugment, graph of DALI's operators on the {device.upper()}"
    return _ours(DaliGraphViews, task, what, device, task.device.index or 0, threads=1)


class _AutoAugment:
    """DALI's own RandAugment as a queue: a flip and two random operations per image, one CPU thread."""

    def __init__(self, task: Task, device: str) -> None:
        from nvidia.dali import fn, pipeline_def
        from nvidia.dali.auto_aug import rand_augment

        from pipelines.dali import fill_queue

        @pipeline_def(enable_conditionals=True)
        def graph() -> Any:
            view = fn.external_source(name="images", device=device, layout="HWC")
            view = fn.flip(view, horizontal=fn.random.coin_flip())
            return rand_augment.rand_augment(view, n=2, m=10, shape=task.images.shape[1:3])

        device_id = task.device.index or 0
        self._store = ImageStore(task.images, device, device_id, resident=True)
        self._pipeline: Any = graph(
            batch_size=task.batch,
            num_threads=1,
            device_id=device_id if device == "gpu" else None,
            prefetch_queue_depth=2,
            exec_dynamic=True,
        )
        fill_queue(self._pipeline, lambda: self._pipeline.feed_input("images", self.prepare(task.plans[0])), 2)

    def prepare(self, plan: ViewPlan) -> Any:
        images = self._store.on_device(None)[torch.from_numpy(plan.image).to(self._store.device)]
        return images if self._store.stream else images.numpy()

    def submit(self, images: Any) -> None:
        self._pipeline.feed_input("images", images)
        self._pipeline.schedule_run()

    def collect(self) -> None:
        self._pipeline.outputs(cuda_stream=torch.cuda.current_stream() if self._store.stream else None)

    def close(self) -> None:
        self._pipeline = None


def _auto_augment(task: Task, device: str) -> Backend:
    what = f"RandAugment of DALI's auto_aug on the {device.upper()}, one CPU thread"
    return _queue(_AutoAugment(task, device), task, what, 2)


def fused(task: Task) -> Backend:
    """Make each view in one fused kernel from images on the device; on a CPU, with its PyTorch reference."""
    from pipelines.fused import FusedViews

    device = "gpu" if task.device.type == "cuda" else "cpu"
    return _ours(FusedViews, task, f"CTAugment, fused, on the {device.upper()}", device, task.device.index or 0)


def randaugment(side: int) -> v2.Compose:
    """Return a weak augmentation followed by two random operations per image: PIL image to (3, side, side) uint8."""
    return v2.Compose([
        v2.RandomCrop(side, padding=MAX_SHIFT, padding_mode="reflect"),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2),
        v2.PILToTensor(),
    ])  # fmt: skip


class StrongViews(Dataset):
    """Data set whose items are views by torchvision's RandAugment of PIL images."""

    def __init__(self, images: np.ndarray, length: int) -> None:
        self.images, self.length = images, length
        self.transform = randaugment(images.shape[1])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> torch.Tensor:
        return self.transform(Image.fromarray(self.images[item % len(self.images)]))


def torchvision(task: Task) -> Backend:
    """Make views the common way: in a DataLoader with a worker per core, with batches copied to the device."""
    loader = DataLoader(
        StrongViews(task.images, task.batch * len(task.plans)),
        batch_size=min(_LOADER_BATCH, task.batch),
        num_workers=task.threads,
        persistent_workers=True,
        pin_memory=task.device.type == "cuda",
    )

    def run() -> None:
        for batch in loader:
            batch.to(task.device, non_blocking=True)

    # The workers live as long as the loader, which `run` holds.
    return run, f"RandAugment of torchvision v2, PIL in a DataLoader of {task.threads} workers"


def _on_tensors(task: Task, transform: Callable[[torch.Tensor], Any], what: str) -> Backend:
    """Apply a transform of float batches to images on the device."""
    images = torch.from_numpy(task.images).permute(0, 3, 1, 2).contiguous().to(task.device)
    batches = [torch.from_numpy(plan.image).to(task.device) for plan in task.plans]

    def run() -> None:
        for indices in batches:
            transform(images[indices].float() / 255)

    return run, what


def kornia(task: Task) -> Backend:
    """Use kornia's crop, flip and RandAugment, which draws its two operations per batch, not per image."""
    from kornia import augmentation as k

    transform = k.AugmentationSequential(
        k.RandomCrop(task.images.shape[1:3], padding=MAX_SHIFT, padding_mode="reflect"),
        k.RandomHorizontalFlip(),
        k.auto.RandAugment(n=2, m=10),
    )
    return _on_tensors(task, transform, f"RandAugment of kornia, same operations for a batch, on the {task.device}")


def triton_augment(task: Task) -> Backend:
    """Use triton-augment's fixed chain, which has no equalize, autocontrast, filters or cutout."""
    from triton_augment import TritonFusedAugment

    transform = TritonFusedAugment(
        horizontal_flip_p=0.5, degrees=45, translate=(0.3, 0.3), scale=(0.5, 1.0), shear=17, brightness=(0.1, 2.0),
        contrast=(0.1, 2.0), saturation=(0.1, 2.0),
    )  # fmt: skip
    return _on_tensors(task, transform, "affine, flip and color jitter of triton-augment in one launch, on the GPU")


BACKENDS: dict[str, Callable[[Task], Backend]] = {
    "pil": pil,
    "torchvision": torchvision,
    "dali-cpu-1": lambda task: _dali(task, 1),
    "dali-cpu": lambda task: _dali(task, task.threads),
    "dali-graph-cpu": lambda task: _dali_graph(task, "cpu"),
    "auto-aug-cpu": lambda task: _auto_augment(task, "cpu"),
    "dali-gpu": lambda task: _dali_graph(task, "gpu"),
    "auto-aug-gpu": lambda task: _auto_augment(task, "gpu"),
    "fused": fused,
    "kornia": kornia,
    "triton-augment": triton_augment,
}
NEED_GPU = ("triton-augment", "dali-gpu", "auto-aug-gpu")


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its living children, such as DataLoader workers."""
    seconds = time.process_time()
    children: list[str] = []
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # The thread has ended since.
            children += listed.read_text(encoding="ascii").split()
    for child in children:
        with suppress(OSError):  # The child has ended since.
            stat = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace")
            seconds += sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _with_cpu_time(run: Callable[[], Any], samples: list[float]) -> Callable[[], Any]:
    """Return a function that runs another one and appends the CPU seconds that it took."""

    def timed() -> None:
        begin = _cpu_seconds()
        run()
        samples.append(_cpu_seconds() - begin)

    return timed


@dataclass
class PipelinesOptions:
    """Time the engine's view pipelines and alternatives from other libraries."""

    out: Path = records.OUT / "pipelines.jsonl"
    """File to append the records to."""
    repeats: int = 5
    """Samples per backend; the median is reported."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Backends to time; pil is always included, as the baseline."""
    rows: int = 512
    """Views per batch, a multiple of 8; 512 is a step's strong views of unlabeled images at B = 64 and K = 8."""
    side: int = 32
    """Height and width of the images."""
    batches: int | None = None
    """Batches per sample; by default 8 with a GPU and 2 without."""
    threads: int = len(os.sched_getaffinity(0))
    """CPU threads or worker processes of parallel backends; by default all cores."""


def main(options: PipelinesOptions) -> None:
    """Time every installed backend, with their samples interleaved.

    Raises:
        UserError: A flag is invalid.
    """
    records.check_choices(options, backends=BACKENDS)
    records.check_numbers(options, repeats=1, rows=K, side=MAX_SHIFT + 1, threads=1, batches=1)
    if options.rows % K:
        raise UserError(f"--rows must be a multiple of {K}, got {options.rows}")
    device = bench_device()
    batches = options.batches or (8 if device.type == "cuda" else 2)
    task = make_task(options.rows, options.side, batches, device, options.threads)
    runs: dict[str, Callable[[], Any]] = {}
    cpu: dict[str, list[float]] = {name: [] for name in BACKENDS}
    descriptions: dict[str, str] = {}
    failures = records.Failures()
    with task.closing:
        # The order of BACKENDS matters: torchvision's workers fork before other libraries start threads.
        for name, make in BACKENDS.items():
            if name != "pil" and name not in options.backends:
                continue
            if name in NEED_GPU and device.type != "cuda":
                print(f"{name}: skipped, needs a GPU", flush=True)
                continue
            with failures.part(name):
                try:
                    run, descriptions[name] = make(task)
                except ModuleNotFoundError as error:
                    print(f"{name}: skipped, {error.name} is not installed", flush=True)
                    continue
                begin = time.perf_counter()
                run()
                print(f"{name}: first call {time.perf_counter() - begin:.2f} s", flush=True)
                runs[name] = _with_cpu_time(run, cpu[name])
        times = measure(runs, device, options.repeats, warm_up=1)
    views = task.batch * batches
    floor = 6 * options.side**2 / ceilings(device).copy_bytes_per_second
    print(ceilings(device).text())
    print(f"roofline bound: {1 / floor:.4g} views/s, each read once and written once at copy bandwidth")
    for name, t in times.items():
        case = {"backend": name, "what": descriptions[name], "rows": task.batch, "side": options.side}
        case |= {"batches": batches, "threads": options.threads}
        speeds = quartiles("views_per_second", views / np.array(t.samples))
        speeds |= {"ratio_to_pil": times["pil"].seconds / t.seconds, "floor_views_per_second": 1 / floor}
        speeds["share_of_copy"] = floor * speeds["views_per_second"]
        per_view = {backend: 1e6 / views * np.array(cpu[backend][1:]) for backend in ("pil", name)}  # No warm-up.
        speeds |= quartiles("cpu_us", per_view[name])
        speeds["cpu_ratio_to_pil"] = float(np.median(per_view["pil"]) / np.median(per_view[name]))
        BENCH.write(options.out, "pipelines", device, **case, **speeds)
    failures.finish()


def _chart(axes: Any, kinds: Mapping[str, Sequence[Record]]) -> None:
    # Points instead of bars, which have no zero on a logarithmic axis.
    for record in sorted(kinds["pipelines"], key=lambda record: record["views_per_second"]):
        point = (record["views_per_second"], record["backend"])
        axes.plot(*point, "o", color="tab:blue")
        axes.annotate(
            f"{record['views_per_second']:,.0f}", point, (8, -3), textcoords="offset points", fontsize="small"
        )
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.set_xlabel("strong views/s")


BENCH = Bench(
    options=PipelinesOptions,
    main=main,
    quick="--repeats 1 --rows 16 --batches 1 --threads 1",
    tables={
        "pipelines": Table(
            chart=_chart,
            key=("backend", "rows", "side"),
            columns={
                "backend": "{backend}",
                "description": "{what}",
                "views/s": "{views_per_second:,.0f}",
                "quartiles": "{views_per_second_low:,.0f} to {views_per_second_high:,.0f}",
                "speedup over PIL": "{ratio_to_pil:.2f}",
                "CPU time per view, us": "{cpu_us:.1f}",
                "per CPU second, relative to PIL": "{cpu_ratio_to_pil:.2f}",
                "share of copy bandwidth": "{share_of_copy:.2%}",
            },
        ),
    },
)

"""`remixmatch bench scaling`: weak and strong scaling on 1, 2, ... GPUs or processes, and a model for more.

Weak scaling keeps B per rank constant, strong scaling the global B. torchrun launches each group of ranks, which times
its cases with interleaved samples. Groups never run at the same time; they are launched alternately in several rounds.
Records contain measurements only. Predictions of the model are printed with their assumptions.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from bench.ranks.scaling_model import (
    ASSUMED_CLUSTERS,
    ASSUMPTIONS,
    Cluster,
    Collective,
    Prediction,
    Work,
    all_reduce_seconds,
    fit_line,
    fit_link,
    predict,
)
from bench.ranks.scaling_worker import CaseSpec, Job
from bench.registry import Bench, Table, quartiles
from bench.step import throughput
from bench.step.throughput import base_config
from engine.config.checks import validate
from engine.config.config import Config
from engine.errors import UserError
from engine.measuring import records
from engine.measuring.steps import VIEWS
from engine.measuring.timing import bench_device
from engine.method.losses import LOSSES
from engine.training.execution import pick_mode
from engine.training.state import make_state
from pipelines.data.datasets import DATASETS
from pipelines.processes import python_environment

SCALINGS = ("weak", "strong")
_REDUCED_SIZES = (2**12, 2**18, 2**20, 2**23)  # Bytes of the all-reduces from which latency and bandwidth are fitted.
# Assumptions if no GPU was measured: seconds of a step at K = 8 and B = 64, and the share independent of the batch.
_TARGET, _FIXED = 6e-3, 0.25
_SPLIT = f"{_FIXED:.0%} of it assumed not to depend on the batch"
Collectives = tuple[Collective, tuple[Collective, ...]]  # The gradient all-reduce, and the other collectives.


@dataclass
class Group:
    """Measurements of a group of ranks, taken on rank 0.

    Attributes:
        ranks: Number of ranks R.
        steps: Seconds per step of all samples of all rounds, by case.
        reduces: Seconds per all-reduce of all samples of all rounds, by bytes.
        facts: Mode, precision, trained inputs per image of B, backend of the collectives, number of gradient buckets.
    """

    ranks: int
    steps: dict[CaseSpec, list[float]] = field(default_factory=dict)
    reduces: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, result: Mapping[str, Any]) -> None:
        """Add the result of `bench.ranks.scaling_worker.work` from one round."""
        for spec, samples in result["steps"].items():
            self.steps.setdefault(spec, []).extend(samples)
        for size, samples in result["reduces"].items():
            self.reduces.setdefault(size, []).extend(samples)
        self.facts = result["facts"]


@dataclass
class ScalingOptions:
    """Time training steps on 1, 2, ... ranks of this machine."""

    out: Path = records.OUT / "scaling.jsonl"
    """File to append the records to."""
    ranks: tuple[int, ...] = ()
    """Numbers of ranks; by default powers of two up to the number of GPUs, or of cores without a GPU."""
    scaling: tuple[str, ...] = SCALINGS
    """weak: --batch images per rank; strong: --batch images over all ranks."""
    rounds: int = 3
    """Launches of every group; the median is over the samples of all rounds."""
    repeats: int = 5
    """Samples per round."""
    preset: str = ""
    """Preset to train; by default the paper's step (WRN-28-2, 32x32, B = 64) with a GPU and digits-40 without."""
    batch: int | None = None
    """B of one rank; by default the preset's."""
    k: int | None = None
    """Strong views per unlabeled image; by default the preset's."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """Same as in remixmatch train."""
    views: str = ""
    """fused, dali or synthetic; by default fused with a GPU and dali without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Same as in remixmatch train."""
    steps: int | None = None
    """Steps per sample; by default 20 with a GPU and 8 without."""


def main(options: ScalingOptions) -> None:
    """Launch every group, write records, and print the model's predictions for comparison.

    Raises:
        UserError: A flag is invalid.
    """
    device = bench_device()
    cuda = device.type == "cuda"
    cores = len(os.sched_getaffinity(0))
    available = torch.cuda.device_count() if cuda else cores
    ranks = sorted(set(options.ranks)) or [2**n for n in range(available.bit_length())]
    records.check_choices(options, scaling=SCALINGS, views=VIEWS)
    records.check_numbers(options, ranks=1, rounds=1, repeats=1, steps=1)
    if cuda and ranks[-1] > available:
        raise UserError(f"--ranks must be at most the number of GPUs ({available}), got {ranks[-1]}")
    if not options.scaling:
        raise UserError(f"--scaling needs at least one of {', '.join(SCALINGS)}")
    steps = options.steps or (20 if cuda else 8)
    views = options.views or ("fused" if cuda else "dali")
    flags = {name: getattr(options, name) for name in ("batch", "k", "mode", "precision")}
    changes = {name: value for name, value in flags.items() if value is not None}
    config = dataclasses.replace(base_config(options.preset, cuda), **changes)
    pick_mode(config, device)
    cases = {r: case_specs(config.batch, r, ranks[-1], options.scaling) for r in ranks}
    for r in ranks:
        for spec in cases[r]:
            validate(dataclasses.replace(config, batch=spec.batch), r if spec.grouped else 1)

    # A rank gets the same number of threads in every group. Otherwise a single rank would use the whole machine.
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(cores // ranks[-1], 1))
    torch.set_num_threads(threads)  # The device name in the records includes it.
    print(f"groups of {_join(ranks)} ranks, {threads} threads per rank", flush=True)
    moved = gradients, _ = step_collectives(config)
    sizes = tuple(sorted({*_REDUCED_SIZES, gradients.fixed_bytes}))
    whole = throughput.whole_batches(steps, config)
    groups = {r: Group(r) for r in ranks}
    failures = records.Failures()
    for number in range(1, options.rounds + 1):
        for r in ranks:
            if _ranks(r) in failures.names:  # Do not launch a failed group again.
                continue
            with failures.part(_ranks(r)):
                job = Job(config, views, tuple(cases[r]), sizes if r > 1 else (), whole, options.repeats)
                groups[r].add(launch(r, threads, job))
                print(f"round {number} of {options.rounds}: {_ranks(r)} done", flush=True)
    common = {"preset": config.preset, "k": config.k, "views": views, "threads": threads, "rounds": options.rounds}
    measured = [group for group in groups.values() if group.steps]
    made = make_records(measured, config.batch, moved, common)
    for record in made:
        BENCH.write(options.out, "scaling", device, **record)
    _compare(measured, made, moved, config.batch)
    _predict(made if cuda and not options.preset else [], config)
    failures.finish()


def case_specs(batch: int, ranks: int, most: int, scaling: Sequence[str]) -> list[CaseSpec]:
    """Return the cases that a group times.

    Args:
        batch: B of one rank.
        ranks: Ranks of the group.
        most: Ranks of the largest group. One rank also trains the share of B that a rank of this group gets under
            strong scaling, to separate the cost that does not depend on the batch.
        scaling: Some of SCALINGS.
    """
    if ranks == 1:
        specs = [CaseSpec(batch, grouped=False), CaseSpec(batch)]
        if most > 1 and "strong" in scaling:
            specs.append(CaseSpec(batch // most))
        return specs
    global_batch = {"weak": batch * ranks, "strong": batch}
    specs = []
    for b in (global_batch[name] for name in SCALINGS if name in scaling):
        specs += [CaseSpec(b), CaseSpec(b, reduced=False), CaseSpec(b // ranks, grouped=False)]
    return specs


def launch(ranks: int, threads: int, job: Job) -> dict[str, Any]:
    """Run a job on `ranks` ranks of this machine and return the result of rank 0; see `scaling_worker.work`.

    Raises:
        RuntimeError: A rank failed; the message includes the end of the output.
    """
    # The ranks must import the same packages as this process.
    environment = python_environment() | {"OMP_NUM_THREADS": str(threads)}
    environment.setdefault("GOMP_SPINCOUNT", "10000")  # Same as the remixmatch command.
    with TemporaryDirectory() as folder:
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "bench.ranks.scaling_worker", folder]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as launcher:
            try:
                printed, _ = launcher.communicate()
            except BaseException:
                launcher.terminate()  # On SIGTERM torchrun ends its ranks; SIGKILL would orphan them.
                raise
        if launcher.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {launcher.returncode}:\n{printed[-8000:]}")
        return pickle.loads((Path(folder) / "result").read_bytes())


def step_collectives(config: Config) -> Collectives:
    """Return the collectives of a configuration's step; they are the same on any number of ranks above one.

    Returns:
        The gradient all-reduce, and the others: an all-gather of logits, an all-reduce of buffers and metrics.
    """
    data = DATASETS[config.dataset]()
    classes = len(data.classes)
    network = make_state(config, classes, torch.device("cpu")).network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    passes = 2 if config.unlabeled else 1  # Guess and probe.
    metrics = len(LOSSES) + 1  # The losses and "stop"; other metrics are the same on all ranks.
    reduced = sum(b.numel() for b in network.buffers()) + metrics
    others = (
        Collective("logits", "all-gather", bytes_per_image=4 * classes * passes),
        Collective("buffers and metrics", "all-reduce", 4 * reduced),
    )
    return Collective("gradients", "all-reduce", 4 * trained), others


def make_records(
    groups: Sequence[Group], batch: int, moved: Collectives, common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the fields of a record for every case that corresponds to a real run.

    Args:
        groups: Measured groups.
        batch: B of one rank.
        moved: See `step_collectives`.
        common: Fields of all records; must include `rounds`.
    """
    one = next((group.steps[CaseSpec(batch, grouped=False)] for group in groups if group.ranks == 1), None)
    made = []
    for group in groups:
        for spec, samples in group.steps.items():
            if not spec.reduced or (not spec.grouped and group.ranks > 1):  # These become fields of other records.
                continue
            fields = {**common, "scaling": _kind(spec, group.ranks, batch), "ranks": group.ranks, "ddp": spec.grouped}
            fields |= {"batch": spec.batch, "mode": group.facts["mode"], "precision": group.facts["precision"]}
            fields |= {"samples": len(samples), **quartiles("step_ms", 1e3 * np.array(samples))}
            fields["images_per_second"] = 1e3 * spec.batch * group.facts["rows_per_image"] / fields["step_ms"]
            if one and spec.batch in (batch, batch * group.ranks):
                fields |= _efficiency(group, spec, samples, one, batch, common["rounds"])
            if group.ranks > 1:
                fields |= _communication(group, spec, samples, moved)
            made.append(fields)
    return made


def _kind(spec: CaseSpec, ranks: int, batch: int) -> str:
    if ranks == 1:
        return "one rank" if spec.batch == batch else "one rank, its share"
    return "strong" if spec.batch == batch else "weak"


def _efficiency(
    group: Group, spec: CaseSpec, samples: Sequence[float], one: Sequence[float], batch: int, rounds: int
) -> dict[str, Any]:
    """Return images per second and rank relative to one rank without a group, over all rounds and by round."""
    share = spec.batch / (group.ranks * batch)

    def efficiency(times: Any, one_rank_times: Any) -> float:
        return share * float(np.median(one_rank_times)) / float(np.median(times))

    fields: dict[str, Any] = {
        "one_rank_images_per_second": batch * group.facts["rows_per_image"] / float(np.median(one)),
        "efficiency": efficiency(samples, one),
    }
    if len(samples) == len(one):
        pairs = zip(np.array_split(samples, rounds), np.array_split(one, rounds), strict=True)
        fields["efficiency_by_round"] = [efficiency(*pair) for pair in pairs]
    if group.ranks == 1 and spec.grouped:  # Samples with and without DDP were interleaved.
        ratios = 100 * (np.asarray(samples) / np.asarray(one) - 1)
        low, high = np.percentile(ratios, (25, 75)).tolist()
        overhead = 100 * float(np.median(samples) / np.median(one) - 1)
        fields |= {"ddp_overhead_percent": overhead, "ddp_overhead_low": low, "ddp_overhead_high": high}
    return fields


def _communication(group: Group, spec: CaseSpec, samples: Sequence[float], moved: Collectives) -> dict[str, Any]:
    """Return the time without communication, the gradient all-reduce and its overlap, and the other collectives."""
    gradients, others = moved
    reduces = np.array(group.reduces[gradients.fixed_bytes])
    reduce = float(np.median(reduces))
    unreduced = group.steps[dataclasses.replace(spec, reduced=False)]
    exposed = np.asarray(samples) - np.asarray(unreduced)
    spread = max(float(np.subtract(*np.percentile(times, (75, 25)))) for times in (exposed, samples))
    overlap = 1 - float(np.median(samples) - np.median(unreduced)) / reduce
    other_bytes = {each.name: each.bytes(spec.batch) for each in others}
    return {
        "beside_step_ms": 1e3 * float(np.median(group.steps[CaseSpec(spec.batch // group.ranks, grouped=False)])),
        "all_reduce_bytes": gradients.fixed_bytes,
        **quartiles("all_reduce_ms", 1e3 * reduces),
        "unreduced_step_ms": 1e3 * float(np.median(unreduced)),
        "overlap": min(max(overlap, 0.0), 1.0),
        "overlap_spread_ms": 1e3 * spread,
        "overlap_noise": "noise" if reduce < spread else "",
        "backend": group.facts["backend"],
        "gradient_buckets": group.facts["gradient_buckets"],
        "other_collectives": len(others),
        "other_bytes": other_bytes,
        "other_total_bytes": sum(other_bytes.values()),
    }


def _compare(groups: Sequence[Group], made: Sequence[Mapping[str, Any]], moved: Collectives, batch: int) -> None:
    """Calibrate the model on one rank and on plain all-reduces, and print predicted and measured steps."""
    work = _measured_work(made, moved)
    points = [(size, group.ranks, float(np.median(t))) for group in groups for size, t in group.reduces.items()]
    if work is None or not points:
        return
    sizes, ranks, times = zip(*points, strict=True)
    link = fit_link(sizes, ranks, times)
    cluster = Cluster(link)
    print(
        f"\nmodel, calibrated in this run: {_cost(work)} on one rank with DDP; link: "
        f"{link.bytes_per_second / 1e9:.3g} GB/s, {1e6 * link.latency:.0f} us"
    )
    for size, r, seconds in points:
        fitted = 1e3 * all_reduce_seconds(size, r, cluster)
        print(f"  all-reduce of {size:,} bytes, {_ranks(r)}: {1e3 * seconds:.3f} ms, fitted {fitted:.3f} ms")
    for record in made:
        if record["ranks"] == 1:
            continue
        prediction = predict(work, cluster, record["ranks"], record["batch"], batch)
        independent = record["beside_step_ms"] + 1e3 * (prediction.seconds - prediction.compute)
        measured = record["step_ms"]
        print(
            f"  {_ranks(record['ranks'])}, {record['scaling']}: {_predicted(prediction)}, measured {measured:.2f} ms, "
            f"{measured / (1e3 * prediction.seconds) - 1:+.0%}; predicted with the compute time of independent ranks "
            f"{independent:.2f} ms, {measured / independent - 1:+.0%}"
        )


def _predicted(prediction: Prediction) -> str:
    return (
        f"predicted {1e3 * prediction.seconds:.2f} ms per step (compute {1e3 * prediction.compute:.2f}, gradients "
        f"{1e3 * prediction.gradients:.2f}, other collectives {1e3 * prediction.others:.2f})"
    )


def _measured_work(made: Sequence[Mapping[str, Any]], moved: Collectives) -> Work | None:
    """Return a step's cost on one rank with DDP, fitted to the batch sizes measured."""
    one = [(record["batch"], record["step_ms"] / 1e3) for record in made if record["ranks"] == 1 and record["ddp"]]
    if not one:
        return None
    return Work(*fit_line(*zip(*one, strict=True)), *moved)


def _predict(made: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Print the model's predictions for the paper's step on many GPUs, based on this run's records of it, if any."""
    paper = base_config("", True)
    moved = step_collectives(paper)
    work = _measured_work(made, moved) if (config.batch, config.k) == (paper.batch, paper.k) else None
    source = f"measured in this run, {made[0]['mode']}" if made else ""
    if work is None:
        work, source = assumed_work(moved, records.read(records.RESULTS / "throughput.jsonl"), paper)
    elif not work.fixed:
        work, source = _split(work.per_image * paper.batch, moved, paper), f"{source}, {_SPLIT}"
    print(
        f"\npredicted, not measured: WRN-28-2 on 32x32, K = {paper.k}, B = {paper.batch}, "
        f"{moved[0].fixed_bytes / 1e6:.2f} MB of gradients\nassumptions:\n"
        f"  one GPU's step: {_cost(work)}; {source}\n{ASSUMPTIONS}"
    )
    for name, (ranks, cluster) in ASSUMED_CLUSTERS.items():
        for kind, batch in (("weak", paper.batch * ranks), ("strong", paper.batch)):
            prediction = predict(work, cluster, ranks, batch, paper.batch)
            print(f"  {name}, {kind}, B = {batch}: {_predicted(prediction)}, efficiency {prediction.efficiency:.0%}")


def assumed_work(moved: Collectives, measured: Sequence[dict[str, Any]], paper: Config) -> tuple[Work, str]:
    """Return the cost of a step on one GPU and its source: records of a GPU, or the design target if there are none.

    Args:
        moved: See `step_collectives`.
        measured: Records of `bench throughput`.
        paper: Configuration of the step.
    """
    wanted = {"preset": paper.preset, "batch": paper.batch, "mode": "graph", "views": "fused", "precision": "bfloat16"}
    for device, newest in reversed(throughput.BENCH.tables["throughput"].newest(measured).items()):
        steps = {record["k"]: record["step_ms"] / 1e3 for record in newest if wanted.items() <= record.items()}
        if device.startswith("CPU") or paper.k not in steps:
            continue
        source = f"`bench throughput` on {device}"
        if len(steps) == 1:
            return _split(steps[paper.k], moved, paper), f"{source}, {_SPLIT}"
        # Per image, K + 4 inputs are trained and two more take a forward pass only, at a third of the cost.
        fixed, _ = fit_line([k + 4 + 2 / 3 for k in steps], list(steps.values()))
        work = Work(fixed, (steps[paper.k] - fixed) / paper.batch, *moved)
        return work, f"{source}, fitted over K = {_join(sorted(steps))}"
    return _split(_TARGET, moved, paper), f"assumed, the design target of {1e3 * _TARGET:.0f} ms; {_SPLIT}"


def _split(step: float, moved: Collectives, paper: Config) -> Work:
    return Work(_FIXED * step, (1 - _FIXED) * step / paper.batch, *moved)


def _cost(work: Work) -> str:
    return f"{1e3 * work.fixed:.2f} ms + {1e3 * work.per_image:.3g} ms per image of B"


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"


BENCH = Bench(
    options=ScalingOptions,
    main=main,
    quick="--ranks 1 --rounds 1 --repeats 1 --steps 1 --batch 2 --views synthetic",
    tables={
        "scaling": Table(
            key=("preset", "k", "scaling", "ranks", "ddp", "batch", "mode", "views", "precision", "threads"),
            columns={
                "preset": "{preset}",
                "K": "{k}",
                "scaling": "{scaling}",
                "ranks": "{ranks}",
                "DDP": "{ddp}",
                "B": "{batch}",
                "mode": "{mode}",
                "views": "{views}",
                "step, ms": "{step_ms:.2f}",
                "quartiles": "{step_ms_low:.2f} to {step_ms_high:.2f}",
                "images/s": "{images_per_second:,.0f}",
                "efficiency": "{efficiency:.1%}",
                "DDP overhead": "{ddp_overhead_percent:+.1f} %",
                "independent ranks, ms": "{beside_step_ms:.2f}",
                "gradient bytes": "{all_reduce_bytes:,}",
                "all-reduce, ms": "{all_reduce_ms:.2f}",
                "overlap with backward": "{overlap:.0%} {overlap_noise}",
                "other collectives": "{other_collectives}",
                "other bytes": "{other_total_bytes:,}",
            },
        ),
    },
)

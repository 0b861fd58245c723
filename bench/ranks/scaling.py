"""`remixmatch bench scaling`: steps on 1, 2, ... GPUs or processes, weak and strong scaling, and a model for many.

Weak scaling keeps B a rank, strong scaling keeps B over all ranks. Each group of ranks is launched by torchrun and
measures its cases in turn, sample by sample; groups take turns round by round, since no two of them may run at once.
Records are measurements. What the model predicts is printed with its assumptions and never becomes a record.
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
from engine.measuring.process import search_path
from engine.measuring.step_worker import ROOT
from engine.measuring.steps import VIEWS
from engine.measuring.timing import bench_device
from engine.training.execution import pick_mode
from engine.training.feed import plan_spec
from engine.training.state import make_state
from pipelines.datasets import DATASETS

SCALINGS = ("weak", "strong")
_REDUCED_SIZES = (2**12, 2**18, 2**20, 2**23)  # bytes of the all-reduces that tell latency from bandwidth
# of a GPU's step where none was measured: seconds at K = 8 and B = 64, and the share in which rows have no part
_TARGET, _FIXED = 6e-3, 0.25
_SPLIT = f"{_FIXED:.0%} of it assumed not to depend on rows"
Collectives = tuple[Collective, tuple[Collective, ...]]  # the gradients' all-reduce, and the others


@dataclass
class Group:
    """What ranks that train together have measured.

    Attributes:
        ranks: R.
        steps: seconds a step, a list a case over all samples of all rounds; of rank 0, as all else.
        reduces: seconds of an all-reduce, by its bytes, likewise.
        facts: mode and precision; rows trained for each of the B images; backend of the collectives, and in how many
            buckets gradients are reduced.
    """

    ranks: int
    steps: dict[CaseSpec, list[float]] = field(default_factory=dict)
    reduces: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, result: Mapping[str, Any]) -> None:
        """Add what `bench.ranks.scaling_worker.work` has returned in a round."""
        for spec, samples in result["steps"].items():
            self.steps.setdefault(spec, []).extend(samples)
        for size, samples in result["reduces"].items():
            self.reduces.setdefault(size, []).extend(samples)
        self.facts = result["facts"]


@dataclass
class ScalingOptions:
    """Times training steps on 1, 2, ... ranks of this machine."""

    out: Path = records.OUT / "scaling.jsonl"
    """Rows are added to this file."""
    ranks: tuple[int, ...] = ()
    """Sizes of the groups; by default powers of two up to the number of GPUs, or of cores without one."""
    scaling: tuple[str, ...] = SCALINGS
    """weak: --batch images a rank; strong: --batch images over all ranks."""
    rounds: int = 3
    """Times that every group is launched, in turn; the median is over all of them."""
    repeats: int = 5
    """Samples a round."""
    preset: str = ""
    """What is trained; by default the paper's step (WRN-28-2, 32x32, B = 64) with a GPU and digits-40 without."""
    batch: int | None = None
    """B of one rank; by default the preset's."""
    k: int | None = None
    """Strong views of an unlabeled image; by default the preset's."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """As in a run."""
    views: str = ""
    """fused, dali or synthetic; by default fused with a GPU and DALI's without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As in a run."""
    steps: int | None = None
    """Steps a sample; by default 20 with a GPU and 8 without."""


def main(options: ScalingOptions) -> None:
    """Launches every group in turn, writes rows, and prints the model's figures beside them.

    Raises:
        UserError: a flag that cannot work.
    """
    device = bench_device()
    cuda = device.type == "cuda"
    cores = len(os.sched_getaffinity(0))
    places = torch.cuda.device_count() if cuda else cores
    ranks = sorted(set(options.ranks)) or [2**n for n in range(places.bit_length())]
    records.check_choices(options, scaling=SCALINGS, views=VIEWS)
    records.check_numbers(options, ranks=1, rounds=1, repeats=1, steps=1)
    if cuda and ranks[-1] > places:
        raise UserError(f"--ranks: {ranks[-1]} ranks need as many GPUs, and torch sees {places}")
    if not options.scaling:
        raise UserError(f"--scaling takes one or more of {', '.join(SCALINGS)}")
    steps = options.steps or (20 if cuda else 8)
    views = options.views or ("fused" if cuda else "dali")
    given = {name: getattr(options, name) for name in ("batch", "k", "mode", "precision")}
    changes = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(base_config(options.preset, cuda), **changes)
    pick_mode(config, device)
    cases = {r: case_specs(config.batch, r, ranks[-1], options.scaling) for r in ranks}
    for r in ranks:
        for spec in cases[r]:
            validate(dataclasses.replace(config, batch=spec.batch), r if spec.grouped else 1)

    # as many threads for one rank as for each of several: else one rank by itself would have the whole machine
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(cores // ranks[-1], 1))
    torch.set_num_threads(threads)  # rows name the device by them
    print(f"groups of {_words(ranks)} ranks, {threads} threads a rank", flush=True)
    moved = gradients, _ = step_collectives(config)
    sizes = tuple(sorted({*_REDUCED_SIZES, gradients.fixed_bytes}))
    whole = throughput.whole_batches(steps, config)
    groups = {r: Group(r) for r in ranks}
    failures = records.Failures()
    for number in range(1, options.rounds + 1):
        for r in ranks:
            if _ranks(r) in failures.names:  # It would fail again.
                continue
            with failures.part(_ranks(r)):
                job = Job(config, views, tuple(cases[r]), sizes if r > 1 else (), whole, options.repeats)
                groups[r].add(launch(r, threads, job))
                print(f"round {number} of {options.rounds}: {_ranks(r)} done", flush=True)
    common = {"preset": config.preset, "k": config.k, "views": views, "threads": threads, "rounds": options.rounds}
    measured = [group for group in groups.values() if group.steps]
    rows = make_rows(measured, config.batch, moved, common)
    for row in rows:
        BENCH.write(options.out, "scaling", device, **row)
    _compare(measured, rows, moved, config.batch)
    _predict(rows if cuda and not options.preset else [], config)
    failures.finish()


def case_specs(batch: int, ranks: int, most: int, scaling: Sequence[str]) -> list[CaseSpec]:
    """What a group of so many ranks times.

    Args:
        batch: B of one rank.
        ranks: of the group.
        most: ranks of the largest group, whose share of B one rank trains too: what of a step does not depend on rows.
        scaling: of SCALINGS.
    """
    if ranks == 1:
        specs = [CaseSpec(batch, grouped=False), CaseSpec(batch)]
        if most > 1 and "strong" in scaling:
            specs.append(CaseSpec(batch // most))
        return specs
    of_all_ranks = {"weak": batch * ranks, "strong": batch}
    specs = []
    for b in (of_all_ranks[name] for name in SCALINGS if name in scaling):
        specs += [CaseSpec(b), CaseSpec(b, reduced=False), CaseSpec(b // ranks, grouped=False)]
    return specs


def launch(ranks: int, threads: int, job: Job) -> dict[str, Any]:
    """Has so many ranks of this machine do a job, and gives what rank 0 measured: see `scaling_worker.work`.

    Raises:
        RuntimeError: a rank failed; has the end of what they said.
    """
    # The ranks import what this process has imported.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": search_path(ROOT)}
    environment.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line has it
    with TemporaryDirectory() as folder:
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "bench.ranks.scaling_worker", folder]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as launcher:
            try:
                said, _ = launcher.communicate()
            except BaseException:
                launcher.terminate()  # upon which it ends its ranks; killed, it would leave them behind
                raise
        if launcher.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {launcher.returncode}:\n{said[-8000:]}")
        return pickle.loads((Path(folder) / "result").read_bytes())


def step_collectives(config: Config) -> Collectives:
    """Return the collectives of a configuration's step, the same on any number of ranks above one.

    Returns:
        The gradients' all-reduce behind backward, and the others: views and logits gathered, buffers and metrics
        reduced.
    """
    data = DATASETS[config.dataset]()
    spec = plan_spec(config, data, np.zeros(config.labels, np.int64))
    classes = len(data.classes)
    network = make_state(config, classes, torch.device("cpu")).network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    passes = 2 if config.unlabeled else 1  # guess and probe
    metrics = 6  # five losses and "stop": what else is shown is the same on all ranks
    reduced = sum(b.numel() for b in network.buffers()) + metrics
    others = (
        Collective("views", "all-gather", bytes_per_image=spec.blocks * data.train_images[0].nbytes),
        Collective("logits", "all-gather", bytes_per_image=4 * classes * passes),
        Collective("buffers and metrics", "all-reduce", 4 * reduced),
    )
    return Collective("gradients", "all-reduce", 4 * trained), others


def make_rows(
    groups: Sequence[Group], batch: int, moved: Collectives, common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for every case that trains as a run does.

    Args:
        groups: measured.
        batch: B of one rank.
        moved: see `step_collectives`.
        common: what all rows say, `rounds` among it.
    """
    one = next((group.steps[CaseSpec(batch, grouped=False)] for group in groups if group.ranks == 1), None)
    rows = []
    for group in groups:
        for spec, samples in group.steps.items():
            if not spec.reduced or (not spec.grouped and group.ranks > 1):  # columns of the others' rows
                continue
            row = dict(common) | {"scaling": _kind(spec, group.ranks, batch), "ranks": group.ranks, "ddp": spec.grouped}
            row |= {"batch": spec.batch, "mode": group.facts["mode"], "precision": group.facts["precision"]}
            row |= {"samples": len(samples), **quartiles("step_ms", 1e3 * np.array(samples))}
            row["images_per_second"] = 1e3 * spec.batch * group.facts["rows_per_image"] / row["step_ms"]
            if one and spec.batch in (batch, batch * group.ranks):
                row |= _against_one(group, spec, samples, one, batch, common["rounds"])
            if group.ranks > 1:
                row |= _communication(group, spec, samples, moved)
            rows.append(row)
    return rows


def _kind(spec: CaseSpec, ranks: int, batch: int) -> str:
    if ranks == 1:
        return "one rank" if spec.batch == batch else "one rank, its share"
    return "strong" if spec.batch == batch else "weak"


def _against_one(
    group: Group, spec: CaseSpec, samples: Sequence[float], one: Sequence[float], batch: int, rounds: int
) -> dict[str, Any]:
    """Images a second and rank, against one rank without a group; within a round by itself, too."""
    share = spec.batch / (group.ranks * batch)

    def efficiency(of: Any, against: Any) -> float:
        return share * float(np.median(against)) / float(np.median(of))

    figures: dict[str, Any] = {
        "one_rank_images_per_second": batch * group.facts["rows_per_image"] / float(np.median(one)),
        "efficiency": efficiency(samples, one),
    }
    if len(samples) == len(one):
        pairs = zip(np.array_split(samples, rounds), np.array_split(one, rounds), strict=True)
        figures["efficiency_by_round"] = [efficiency(*pair) for pair in pairs]
    if group.ranks == 1 and spec.grouped:  # the two took turns, sample by sample
        ratios = 100 * (np.asarray(samples) / np.asarray(one) - 1)
        low, high = np.percentile(ratios, (25, 75)).tolist()
        overhead = 100 * float(np.median(samples) / np.median(one) - 1)
        figures |= {"ddp_overhead_percent": overhead, "ddp_overhead_low": low, "ddp_overhead_high": high}
    return figures


def _communication(group: Group, spec: CaseSpec, samples: Sequence[float], moved: Collectives) -> dict[str, Any]:
    """What ranks cost one another without a word between them, the gradients' all-reduce, how much of it backward
    hides, and the other collectives' bytes."""
    gradients, others = moved
    reduces = np.array(group.reduces[gradients.fixed_bytes])
    reduce = float(np.median(reduces))
    apart = group.steps[dataclasses.replace(spec, reduced=False)]
    saved = np.asarray(samples) - np.asarray(apart)
    spread = max(float(np.subtract(*np.percentile(times, (75, 25)))) for times in (saved, samples))
    hidden = 1 - float(np.median(samples) - np.median(apart)) / reduce
    other_bytes = {each.name: each.bytes(spec.batch) for each in others}
    return {
        "beside_step_ms": 1e3 * float(np.median(group.steps[CaseSpec(spec.batch // group.ranks, grouped=False)])),
        "all_reduce_bytes": gradients.fixed_bytes,
        **quartiles("all_reduce_ms", 1e3 * reduces),
        "unreduced_step_ms": 1e3 * float(np.median(apart)),
        "overlap": min(max(hidden, 0.0), 1.0),
        "overlap_spread_ms": 1e3 * spread,
        "overlap_noise": "noise" if reduce < spread else "",
        "backend": group.facts["backend"],
        "gradient_buckets": group.facts["gradient_buckets"],
        "other_collectives": len(others),
        "other_bytes": other_bytes,
        "other_total_bytes": sum(other_bytes.values()),
    }


def _compare(groups: Sequence[Group], rows: Sequence[Mapping[str, Any]], moved: Collectives, batch: int) -> None:
    """Calibrate the model on one rank and on bare all-reduces, and print its steps and those measured."""
    work = _measured_work(rows, moved)
    points = [(size, group.ranks, float(np.median(t))) for group in groups for size, t in group.reduces.items()]
    if work is None or not points:
        return
    sizes, ranks, times = zip(*points, strict=True)
    link = fit_link(sizes, ranks, times)
    cluster = Cluster(link)
    print(
        f"\nmodel, calibrated in this run: {_cost(work)} on one rank with a group; a link of "
        f"{link.bytes_per_second / 1e9:.3g} GB/s and {1e6 * link.latency:.0f} us"
    )
    for size, r, seconds in points:
        fitted = 1e3 * all_reduce_seconds(size, r, cluster)
        print(f"  all-reduce of {size:,} bytes, {_ranks(r)}: {1e3 * seconds:.3f} ms, fitted {fitted:.3f} ms")
    for row in rows:
        if row["ranks"] == 1:
            continue
        made = predict(work, cluster, row["ranks"], row["batch"], batch)
        beside = row["beside_step_ms"] + 1e3 * (made.seconds - made.compute)
        print(
            f"  {_ranks(row['ranks'])}, {row['scaling']}: {_predicted(made)}, measured {row['step_ms']:.2f} ms, "
            f"{row['step_ms'] / (1e3 * made.seconds) - 1:+.0%}; with compute as measured beside one another, "
            f"{beside:.2f} ms, {row['step_ms'] / beside - 1:+.0%}"
        )


def _predicted(made: Prediction) -> str:
    return (
        f"predicted {1e3 * made.seconds:.2f} ms a step (compute {1e3 * made.compute:.2f}, gradients "
        f"{1e3 * made.gradients:.2f}, other collectives {1e3 * made.others:.2f})"
    )


def _measured_work(rows: Sequence[Mapping[str, Any]], moved: Collectives) -> Work | None:
    """A step's cost on one rank of a group, from the batches measured there."""
    one = [(row["batch"], row["step_ms"] / 1e3) for row in rows if row["ranks"] == 1 and row["ddp"]]
    if not one:
        return None
    return Work(*fit_line(*zip(*one, strict=True)), *moved)


def _predict(rows: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Prints what the model makes of the paper's step on many GPUs; rows are those that this run has of that step."""
    paper = base_config("", True)
    moved = step_collectives(paper)
    work = _measured_work(rows, moved) if (config.batch, config.k) == (paper.batch, paper.k) else None
    source = f"measured in this run, {rows[0]['mode']}" if rows else ""
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
            made = predict(work, cluster, ranks, batch, paper.batch)
            print(f"  {name}, {kind}, B = {batch}: {_predicted(made)}, efficiency {made.efficiency:.0%}")


def assumed_work(moved: Collectives, rows: Sequence[dict[str, Any]], paper: Config) -> tuple[Work, str]:
    """The step of one GPU, and where that is from: rows of `bench throughput` on a GPU, else the design's target.

    Args:
        moved: see `step_collectives`.
        rows: of throughput.jsonl.
        paper: the configuration whose step it is.
    """
    wanted = {"preset": paper.preset, "batch": paper.batch, "mode": "graph", "views": "fused", "precision": "bfloat16"}
    for device, found in reversed(throughput.BENCH.tables["throughput"].newest(rows).items()):
        steps = {row["k"]: row["step_ms"] / 1e3 for row in found if wanted.items() <= row.items()}
        if device.startswith("CPU") or paper.k not in steps:
            continue
        source = f"`bench throughput` on {device}"
        if len(steps) == 1:
            return _split(steps[paper.k], moved, paper), f"{source}, {_SPLIT}"
        # K + 4 rows an image are trained, and two more go forward alone, for a third of the cost
        fixed, _ = fit_line([k + 4 + 2 / 3 for k in steps], list(steps.values()))
        work = Work(fixed, (steps[paper.k] - fixed) / paper.batch, *moved)
        return work, f"{source}, over K = {_words(sorted(steps))}"
    return _split(_TARGET, moved, paper), f"the design's target of {1e3 * _TARGET:.0f} ms, an assumption; {_SPLIT}"


def _split(step: float, moved: Collectives, paper: Config) -> Work:
    return Work(_FIXED * step, (1 - _FIXED) * step / paper.batch, *moved)


def _cost(work: Work) -> str:
    return f"{1e3 * work.fixed:.2f} ms + {1e3 * work.per_image:.3g} ms an image of B"


def _words(numbers: Sequence[int]) -> str:
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
                "DDP costs": "{ddp_overhead_percent:+.1f} %",
                "ranks apart, ms": "{beside_step_ms:.2f}",
                "gradients, bytes": "{all_reduce_bytes:,}",
                "all-reduce, ms": "{all_reduce_ms:.2f}",
                "behind backward": "{overlap:.0%} {overlap_noise}",
                "other collectives": "{other_collectives}",
                "their bytes": "{other_total_bytes:,}",
            },
        ),
    },
)

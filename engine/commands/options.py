"""Flags over a configuration: every field of `Config` is one, in the sections of its metadata, beside other options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from engine.commands.parsing import parse
from engine.config import methods
from engine.config.checks import folder_name
from engine.config.config import SECTIONS, Config
from engine.distributed import launch
from engine.errors import UserError


@dataclass(frozen=True)
class FolderOptions:
    """Where the run goes."""

    out: Path | None = None
    """The run's folder; by default runs/PRESET-seedN, numbered on if that exists."""
    resume: bool = False
    """Go on with the run in --out, by default the newest of this preset and seed."""
    quiet: bool = False
    """Print nothing but the summary and warnings."""


@dataclass(frozen=True)
class AblationOptions:
    """Changes of the method by name."""

    ablate: tuple[str, ...] = ()
    """Ablations of the paper by name, such as k=4, no-rotation, no-alignment or mean-guess; an unknown name lists
    them. Each sets fields that are flags, too."""


@dataclass(frozen=True)
class SourceOptions:
    """Where data come from."""

    data: Path | None = None
    """A folder of images that `remixmatch data prepare` has prepared, instead of --dataset."""
    data_dir: Path | None = None
    """Where prepared data sets lie; by default the variable REMIXMATCH_DATA, or ~/.cache/remixmatch."""
    class_prior: Path | None = None
    """A JSON object with the known probability of each class, instead of --class-distribution."""


@dataclass(frozen=True)
class RankOptions:
    """Processes that train together."""

    gpus: int = 1
    """Ranks on this machine, a GPU each, or a process each on a CPU: more than one are started by torchrun."""
    max_restarts: int = 0
    """How often torchrun starts the ranks again, from the last good checkpoint, after one of them has died."""
    timeout: float = 600.0
    """Seconds that a rank waits for another one before it ends with a message."""
    check_ranks: int = 0
    """For debugging: steps between comparisons of the ranks' states, bit for bit; 0 for none."""


@dataclass(frozen=True)
class TrainOptions:
    """What a command line asks for: a configuration, and how it is trained.

    Attributes:
        config: with the values of the flags; what depends on the data may be open.
        folder, ablations, source, ranks: the other flags.
        others: groups of flags of the command's own, by name.
    """

    config: Config
    folder: FolderOptions = FolderOptions()
    ablations: AblationOptions = AblationOptions()
    source: SourceOptions = SourceOptions()
    ranks: RankOptions = RankOptions()
    others: Mapping[str, Any] = field(default_factory=dict)


def parse_train(
    argv: Sequence[str],
    base: Config,
    command: str = "train",
    text: str = "Trains a preset, or what the flags make of it.",
    help: Mapping[str, str] | None = None,
    others: Mapping[str, Any] | None = None,
) -> TrainOptions:
    """Parse flags over a configuration. Method and ablations set other fields, which flags of their own override.

    Args:
        argv: the preset, and flags.
        base: what flags are over.
        command: that they are of.
        text: what it does, for its help.
        help: of fields that mean something else there.
        others: defaults of further groups of flags, or of `FolderOptions` as "folder".
    """

    def parsed(config: Config) -> TrainOptions:
        groups = {"folder": FolderOptions(), "ablations": AblationOptions(), "source": SourceOptions()}
        groups |= {"ranks": RankOptions(), **(others or {})}
        kind = _options(config, groups, text, help or {})
        found = parse(kind, f"{command} {argv[0]}".rstrip(), list(argv[1:]))
        values = {name: value for section in SECTIONS for name, value in vars(getattr(found, section)).items()}
        if found.source.data:
            values["dataset"] = folder_name(found.source.data)
        known = {name: getattr(found, name) for name in ("folder", "ablations", "source", "ranks")}
        rest = {name: getattr(found, name) for name in groups.keys() - known.keys()}
        return TrainOptions(dataclasses.replace(config, **values), **known, others=rest)

    options = parsed(base)
    method, ablations = options.config.method, options.ablations.ablate
    if method == base.method and not ablations:
        return options
    changed = base if method == base.method else methods.with_method(base, method)
    return parsed(methods.ablate(changed, *ablations))


def _options(config: Config, groups: Mapping[str, Any], text: str, help: Mapping[str, str]) -> type:
    """Make a dataclass that tyro fills: the sections of the configuration, and the groups."""
    hints = get_type_hints(Config)
    sections: dict[str, list[Any]] = {name: [] for name in SECTIONS}
    for each in dataclasses.fields(Config):
        if "section" not in each.metadata:
            continue
        kind: Any = Literal[tuple(methods.METHODS)] if each.name == "method" else hints[each.name]
        hint = Annotated[kind, tyro.conf.arg(help=help.get(each.name, each.metadata["help"]))]
        sections[each.metadata["section"]].append((each.name, hint, field(default=getattr(config, each.name))))
    defaults = {
        name: dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": SECTIONS[name]})()
        for name, fields in sections.items()
    } | dict(groups)
    # without help of its own tyro looks for that of each group in the source, which a class made here has not
    members = [
        (name, Annotated[type(default), tyro.conf.arg(help=type(default).__doc__)], field(default=default))
        for name, default in defaults.items()
    ]
    return dataclasses.make_dataclass("Options", members, frozen=True, namespace={"__doc__": text})


def check_ranks(ranks: RankOptions) -> None:
    """Raises UserError where a flag of ranks cannot work."""
    for flag, least in (("gpus", 1), ("max_restarts", 0), ("check_ranks", 0)):
        if getattr(ranks, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(ranks, flag)}")
    if not ranks.timeout > 0:
        raise UserError(f"--timeout must be more than 0 seconds, got {ranks.timeout}")
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if launch.is_torchrun_worker() and ranks.gpus not in (1, int(local)):
        raise UserError(f"--gpus {ranks.gpus} under a torchrun of {local}: leave out one of the two")


def check_places(config: Config, ranks: RankOptions) -> None:
    """Raises UserError where there are fewer GPUs than ranks."""
    import torch

    from engine.training.execution import pick_device

    places = torch.cuda.device_count() if pick_device(config).type == "cuda" else ranks.gpus
    if ranks.gpus > places:
        raise UserError(f"--gpus {ranks.gpus}: torch sees {places} here; --device cpu trains without any")

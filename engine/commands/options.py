"""Flags of `remixmatch train` and related commands: one for each field of `Config`, plus those of other options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from engine.commands.parsing import DataDir, parse
from engine.config import methods
from engine.config.checks import folder_name
from engine.config.config import SECTIONS, Config
from engine.distributed import launch
from engine.errors import UserError


@dataclass(frozen=True)
class FolderOptions:
    """Folder of the run, and what is printed."""

    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="DIR",
            help="The run's folder.",
            help_behavior_hint="(default: runs/PRESET-seedN, with a number appended if it exists)",
        ),
    ] = None
    resume: bool = False
    """Resume the run in --out, or start it if there is none; without --out, the newest run of this preset and seed."""
    quiet: bool = False
    """Print only the summary and warnings."""


@dataclass(frozen=True)
class AblationOptions:
    """Named changes of the method."""

    ablate: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help=f"Ablations to apply, each of which sets other flags: {', '.join(methods.ABLATIONS)}.",
            help_behavior_hint="(default: none)",
        ),
    ] = ()


@dataclass(frozen=True)
class SourceOptions:
    """Location of the data."""

    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """Folder of images, prepared by 'remixmatch data prepare', to train on instead of --dataset."""
    data_dir: DataDir = None
    class_prior: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """JSON file that maps each class name to its known probability, instead of --class-distribution."""


@dataclass(frozen=True)
class RankOptions:
    """Ranks: processes that train together."""

    gpus: int = 1
    """Ranks on this machine: one GPU each, or one CPU process each. If more than one, torchrun starts them."""
    max_restarts: int = 0
    """Restart the ranks up to this many times from the last valid checkpoint after a failure."""
    timeout: float = 600.0
    """Seconds a rank waits for another rank before it gives up with an error."""
    check_ranks: int = 0
    """For debugging: steps between bitwise comparisons of the ranks' states; 0 disables them."""


@dataclass(frozen=True)
class TrainOptions:
    """Parsed command line: a configuration, and how to train it.

    Attributes:
        config: Configuration with the values of the flags, not yet resolved with the data.
        folder: Folder flags.
        ablations: Ablation flags.
        source: Data location flags.
        ranks: Rank flags.
        others: Further groups of flags of the command, by name.
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
    text: str = "Train a preset, optionally overridden by flags.",
    help: Mapping[str, str] | None = None,
    others: Mapping[str, Any] | None = None,
) -> TrainOptions:
    """Parse flags that override a configuration.

    --method and --ablate set other fields, which their own flags override in turn.

    Args:
        argv: The preset and flags; an empty preset stands for flags of `remixmatch train` in another command.
        base: Configuration that the flags override.
        command: Name of the command.
        text: Description of the command for its help.
        help: Help texts of fields that have a different meaning in this command.
        others: Defaults of further groups of flags, or a replacement of `FolderOptions` as "folder".

    Raises:
        UserError: Invalid flags.
    """

    def parsed(config: Config) -> TrainOptions:
        groups = {"folder": FolderOptions(), "ablations": AblationOptions(), "source": SourceOptions()}
        groups |= {"ranks": RankOptions(), **(others or {})}
        kind = _options(config, groups, text, help or {})
        flags = parse(kind, f"{command} {argv[0]}" if argv[0] else f"train {config.preset}", list(argv[1:]))
        values = {name: value for section in SECTIONS for name, value in vars(getattr(flags, section)).items()}
        if flags.source.data:
            values["dataset"] = folder_name(flags.source.data)
        known = {name: getattr(flags, name) for name in ("folder", "ablations", "source", "ranks")}
        rest = {name: getattr(flags, name) for name in groups.keys() - known.keys()}
        return TrainOptions(dataclasses.replace(config, **values), **known, others=rest)

    options = parsed(base)
    method, ablations = options.config.method, options.ablations.ablate
    if method == base.method and not ablations:
        return options
    changed = base if method == base.method else methods.with_method(base, method)
    return parsed(methods.ablate(changed, *ablations))


def _options(config: Config, groups: Mapping[str, Any], text: str, help: Mapping[str, str]) -> type:
    """Make the dataclass that tyro fills: the sections of the configuration and further groups of flags."""
    hints = get_type_hints(Config)
    sections: dict[str, list[Any]] = {name: [] for name in SECTIONS}
    for each in dataclasses.fields(Config):
        if "section" not in each.metadata:
            continue
        kind: Any = Literal[tuple(methods.METHODS)] if each.name == "method" else hints[each.name]
        default = getattr(config, each.name)
        none = "(default: none)" if default in ((), "") else None
        text_of = help.get(each.name, each.metadata["help"])
        hint = Annotated[kind, tyro.conf.arg(help=text_of, help_behavior_hint=none)]
        sections[each.metadata["section"]].append((each.name, hint, field(default=default)))
    defaults = {
        name: dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": SECTIONS[name]})()
        for name, fields in sections.items()
    } | dict(groups)
    titles = {"ablations": "ablation", "ranks": "rank"}  # The help appends "options".
    # Without a help text, tyro searches the source code of each group for one, and a class made here has no source.
    members = [
        (name, Annotated[type(default), tyro.conf.arg(name=titles.get(name), help=type(default).__doc__)], default)
        for name, default in defaults.items()
    ]
    return dataclasses.make_dataclass("Options", members, frozen=True, namespace={"__doc__": text})


def check_ranks(ranks: RankOptions) -> None:
    """Raise UserError if a rank flag is not allowed."""
    for flag, least in (("gpus", 1), ("max_restarts", 0), ("check_ranks", 0)):
        if getattr(ranks, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(ranks, flag)}")
    if not ranks.timeout > 0:
        raise UserError(f"--timeout must be more than 0 seconds, got {ranks.timeout}")
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if launch.is_torchrun_worker() and ranks.gpus not in (1, int(local)):
        raise UserError(f"--gpus {ranks.gpus} contradicts the {local} local ranks of torchrun; omit --gpus")


def check_gpu_count(config: Config, ranks: RankOptions) -> None:
    """Raise UserError if there are fewer GPUs than ranks."""
    import torch

    from engine.training.execution import pick_device

    places = torch.cuda.device_count() if pick_device(config).type == "cuda" else ranks.gpus
    if ranks.gpus > places:
        raise UserError(f"--gpus {ranks.gpus}: torch sees only {places}; --device cpu trains without GPUs")

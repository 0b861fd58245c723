"""Flags of `remixmatch train` and related commands: one for each field of `Config`, plus those of other options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from engine.commands.parsing import DataDir, flags_of, parse
from engine.config import methods
from engine.config.checks import check_labels, folder_name
from engine.config.config import SECTIONS, Config, changes
from engine.config.files import read_config
from engine.config.scaling import lengths, scaled
from engine.config.values import flag_of, flag_with_value
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
class ConfigurationOptions:
    """The configuration as a whole."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """YAML file, config.json of a run, or - for stdin: settings that replace the preset's; flags override them."""
    steps_scale: float = 1.0
    """Scale steps, ramp, intervals, and the windows of EMA and batch norm together; their own flags override it."""
    print_config: bool = False
    """Print the configuration as YAML, and where each value comes from; train nothing."""


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
        sources: Where the value of each field comes from, such as "preset digits-40" or "--k".
        given: The fields that have a flag, or that the file of --config changes, and what a message calls each of them.
    """

    config: Config
    folder: FolderOptions = FolderOptions()
    ablations: AblationOptions = AblationOptions()
    source: SourceOptions = SourceOptions()
    ranks: RankOptions = RankOptions()
    others: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)


def parse_train(
    argv: Sequence[str],
    base: Config,
    command: str = "train",
    text: str = "Train a preset, optionally overridden by flags.",
    help: Mapping[str, str] | None = None,
    others: Mapping[str, Any] | None = None,
    begun: Config | None = None,
    read: Callable[[Path], Mapping[str, Any]] = read_config,
) -> TrainOptions:
    """Parse flags that override a configuration.

    --config, --method, --ablate and --steps-scale set other fields, in this order; their own flags override them.

    Args:
        argv: The preset and flags; an empty preset stands for flags of `remixmatch train` in another command.
        base: Configuration that the flags override.
        command: Name of the command.
        text: Description of the command for its help.
        help: Help texts of fields that have a different meaning in this command.
        others: Defaults of further groups of flags, or a replacement of `FolderOptions` as "folder".
        begun: Configuration of the run that is resumed, which the flags override instead; --steps-scale still scales
            the preset, so that the same flags give the same run.
        read: Function that reads the file of --config, see `read_config`.

    Raises:
        UserError: Invalid flags, or an invalid file of --config.
    """

    def parsed(config: Config) -> TrainOptions:
        groups = _groups(others)
        kind = _options(config, groups, text, help or {})
        flags = parse(kind, f"{command} {argv[0]}" if argv[0] else f"train {config.preset}", list(argv[1:]))
        values = {name: value for section in SECTIONS for name, value in vars(getattr(flags, section)).items()}
        if flags.source.data:
            values["dataset"] = folder_name(flags.source.data)
        known = {name: getattr(flags, name) for name in ("folder", "ablations", "source", "ranks")}
        rest = {name: getattr(flags, name) for name in groups.keys() - known.keys()}
        return TrainOptions(dataclasses.replace(config, **values), **known, others=rest)

    if begun and begun.method != base.method:
        base = methods.with_method(base, begun.method)
    options = parsed(begun or base)
    flags = _given_fields(argv[1:])
    if options.source.data and "dataset" in flags:
        raise UserError("--dataset and --data both name the images; leave out one of them")
    if options.source.class_prior and "class_distribution" in flags:
        raise UserError("--class-prior and --class-distribution both set p(y); leave out one of them")
    overall = options.others.get("configuration", ConfigurationOptions())
    values = dict(read(overall.config)) if overall.config else {}
    if values.pop("preset", base.preset) != base.preset:
        raise UserError(f"--config {overall.config} is of another preset than {base.preset}; leave out the preset")
    method = options.config.method
    if "method" in flags and values.get("method", method) != method and methods.METHODS.get(values["method"]):
        raise UserError(f"--method {method}: --config {overall.config} has method {values['method']}; leave out one")

    given: dict[str, str] = {}

    def layered(start: Config, source: str) -> _Layers:
        layers = _Layers(start, source)
        chosen = values.get("method", start.method)
        layers.set_method(chosen, f"method {chosen} in --config {overall.config}")
        before = layers.config
        layers.set(dataclasses.replace(before, **values), f"--config {overall.config}", values)
        given.update((name, f"{name} in --config {overall.config}") for name in changes(before, layers.config))
        if "method" in flags:
            layers.set_method(method, f"--method {method}")
        names = options.ablations.ablate
        layers.set(methods.ablate(layers.config, *names), f"--ablate {' '.join(names)}")
        return layers

    layers = layered(begun or base, "resumed run" if begun else f"preset {base.preset}")
    if overall.steps_scale != 1:
        whole = layered(base, "").config
        if begun:
            whole = methods.keep_ramp_steps(dataclasses.replace(whole, batch=begun.batch), base.batch)
        whole = scaled(whole, overall.steps_scale)
        layers.set(dataclasses.replace(layers.config, **lengths(whole)), f"--steps-scale {overall.steps_scale:g}")
    if layers.config != (begun or base):
        options = parsed(layers.config)
    config = options.config
    sources = layers.sources | {name: flag_of(name) for name in flags}
    if options.source.data:
        sources["dataset"] = "--data"
    given |= {name: flag_with_value(name, getattr(config, name))[0] for name in flags}
    if options.source.class_prior:
        given["class_distribution"] = "--class-prior"
    if not begun and "ramp_kimg" not in given:
        config = methods.keep_ramp_steps(config, base.batch)
    check_labels(config, given)
    methods.check_ablations(options.ablations.ablate, config, flags)
    return dataclasses.replace(options, config=config, sources=sources, given=given)


def train_flags() -> dict[str, Any]:
    """Return the type of each flag of `remixmatch train`."""
    return flags_of(_options(Config(), _groups({"configuration": ConfigurationOptions()}), "", {}))


def _groups(others: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the defaults of the groups of flags that are no fields; `others` adds to them or replaces them."""
    groups = {"folder": FolderOptions(), "ablations": AblationOptions(), "source": SourceOptions()}
    return {**groups, "ranks": RankOptions(), **(others or {})}


class _Layers:
    """A configuration, changed by one layer of settings after another, and the source of each value.

    Args:
        config: The first layer.
        source: Its source; values that it leaves at the defaults of `Config` have the source "default".
    """

    def __init__(self, config: Config, source: str) -> None:
        self.config = config
        changed = changes(Config(), config)
        names = [each.name for each in dataclasses.fields(Config)]
        self.sources = {name: source if name in changed or name == "preset" else "default" for name in names}

    def set(self, config: Config, source: str, fields: Iterable[str] = ()) -> None:
        """Replace the configuration. The source applies to the fields that differ, and to the given ones."""
        self.sources |= dict.fromkeys([*changes(self.config, config), *fields], source)
        self.config = config

    def set_method(self, method: str, source: str) -> None:
        """Apply a method if it is another one."""
        if method != self.config.method:
            self.set(methods.with_method(self.config, method), source)


def _given_fields(argv: Sequence[str]) -> set[str]:
    """Return the fields that have a flag in a command line."""
    flags = (word.partition("=")[0] for word in argv if word.startswith("--"))
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    return {each.name for each in dataclasses.fields(Config) if {each.name, f"no_{each.name}"} & names}


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
            raise UserError(f"{flag_of(flag)} must be at least {least}, got {getattr(ranks, flag)}")
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

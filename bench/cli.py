"""`remixmatch bench NAME`: one entry a bench."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from engine.commands.parsing import parse, show_usage
from engine.errors import UserError

# by the name of its module, which is imported when it is called for: options, and what is measured
BENCHES = {
    "digits": ("DigitsOptions", "accuracy on handwritten digits over seeds, beside LabelSpreading of scikit-learn"),
    "baseline": ("BaselineOptions", "the training step in plain PyTorch and as other libraries write it, in turns"),
    "count": ("CountOptions", "launches, bytes and operations of the captured step on a GPU, counted without one"),
    "variants": (
        "VariantsOptions",
        "the captured step with each decision taken otherwise, in turns, and a profile of it",
    ),
    "convolutions": (
        "ConvolutionsOptions",
        "every convolution of the paper's network alone, against its roofline bound",
    ),
    "kernels": ("KernelsOptions", "each Triton kernel and its PyTorch twin, against the device's copy bandwidth"),
    "pipelines": ("PipelinesOptions", "strong views a second: DALI, the fused kernel, PIL, torchvision and others"),
    "host": ("HostOptions", "CPU time of a step on the host, by part and thread"),
    "throughput": ("ThroughputOptions", "training steps a second by K, mode and source of views"),
    "scaling": ("ScalingOptions", "steps on 1, 2, ... GPUs or processes, weak and strong, and a model of many"),
    "start": ("StartOptions", "from the command to the first trained step, by part"),
    "restart": ("RestartOptions", "from SIGKILL of a rank to the next step of its group, by part"),
    "data": ("DataOptions", "opening a cache, preparing a folder beside DALI alone, training on many images"),
    "opening": (
        "OpeningOptions",
        "a page of `remixmatch report`: its size, and how long a browser takes to draw it",
    ),
    "report": ("ReportOptions", "tables and charts of the measured rows"),
}


def module(name: str) -> str:
    """The module of a bench, which lies in one of the folders here."""
    (path,) = Path(__file__).parent.glob(f"**/{name}.py")
    return ".".join(["bench", *path.relative_to(Path(__file__).parent).with_suffix("").parts])


def main(argv: Sequence[str]) -> None:
    """Runs the bench that the first word names.

    Raises:
        UserError: no bench, or none of that name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        texts = {name: text for name, (_, text) in BENCHES.items()}
        show_usage("bench NAME [flags]", texts, "remixmatch bench NAME --help lists its flags.")
        if not argv:
            raise UserError("bench needs a name")
        return
    if argv[0] not in BENCHES:
        raise UserError(f"bench takes one of {', '.join(BENCHES)}")
    bench = import_module(module(argv[0]))
    options = parse(getattr(bench, BENCHES[argv[0]][0]), f"bench {argv[0]}", list(argv[1:]))

    from engine.measuring import records

    records.commit()  # what runs is what was there at the start, whatever is committed meanwhile
    bench.main(options)

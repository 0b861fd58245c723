"""A run's EMA model as one file for others: uint8 images in, class probabilities out, class names beside them.

safetensors: the parameters, and what rebuilds the network. torch: a program of torch.export. onnx: for any runtime of
ONNX. Preprocessing is inside of all of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config.config import Config, config_json, parse_config
from engine.errors import UserError, cannot_write
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from pipelines.files import write_bytes

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
_EXAMPLES = 2  # images of the batch that a program is traced with; any other number does as well
_METADATA = "remixmatch.json"


class Predictor(nn.Module):
    """A network with its preprocessing: (N, H, W, 3) uint8 images to (N, L) float32 probabilities.

    Args:
        network: in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: TwoHeadNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(network.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return self.network(pixels)[0].softmax(-1)


def export(
    network: TwoHeadNetwork, config: Config, classes: tuple[str, ...], sides: tuple[int, int], to: str, path: Path
) -> None:
    """Writes a network; a file of that name is replaced as a whole.

    Args:
        network: on the CPU, in evaluation mode and single precision.
        config: of its run.
        classes: names.
        sides: (H, W) of the images.
        to: a key of SUFFIXES.
        path: of the file.

    Raises:
        UserError: a package is missing, or the file cannot be written.
    """
    metadata = {
        "classes": json.dumps(classes), "sides": json.dumps(sides), "preset": config.preset,
        "config": config_json(config), "remixmatch-engine": version("remixmatch-engine"),
        "input": "images: (N, H, W, 3) uint8", "output": "probabilities: (N, L) float32",
    }  # fmt: skip
    convert = {"safetensors": _to_safetensors, "torch": _to_torch, "onnx": _to_onnx}[to]
    try:
        write_bytes(path, convert(network, metadata, sides))
    except OSError as error:
        raise cannot_write(path, error) from error


def _to_safetensors(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int]) -> bytes:
    return safetensors_bytes(network, metadata)


def safetensors_bytes(network: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of a network's parameters and buffers."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in network.state_dict().items()}, metadata)


def _program(network: TwoHeadNetwork, sides: tuple[int, int]) -> Any:
    images = torch.zeros((_EXAMPLES, *sides, 3), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(Predictor(network).eval(), (images,), dynamic_shapes={"images": {0: batch}})


def _to_torch(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int]) -> bytes:
    file = io.BytesIO()  # torch aborts the process where a file cannot be written
    torch.export.save(_program(network, sides), file, extra_files={_METADATA: json.dumps(metadata)})
    return file.getvalue()


def _to_onnx(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int]) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError:
        raise UserError("export --to onnx needs onnx: pip install 'remixmatch-engine[onnx]'") from None
    program = torch.onnx.export(
        _program(network, sides), input_names=["images"], output_names=["probabilities"], dynamo=True, verbose=False
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def load_safetensors(path: Path) -> tuple[Predictor, tuple[str, ...], tuple[int, int]]:
    """What `export` to safetensors has written: the predictor, class names, and (H, W) of the images.

    Raises:
        UserError: the file cannot be read, or is not an exported model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not {"classes", "sides", "config"} <= metadata.keys():
        raise UserError(f"{path} is not a model that remixmatch export has written")
    classes, (height, width) = tuple(json.loads(metadata["classes"])), json.loads(metadata["sides"])
    config = parse_config(metadata["config"], path)
    network = make_network(config, len(classes), torch.device("cpu"), (height, width), trained=True).eval().float()
    network.load_state_dict(tensors)
    return Predictor(network).eval(), classes, (height, width)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an exported file, by its suffix."""
    readers: dict[str, Callable[[Path], dict[str, str]]] = {".onnx": _onnx_metadata, ".pt2": _torch_metadata}
    if path.suffix in readers:
        return readers[path.suffix](path)
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _onnx_metadata(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def _torch_metadata(path: Path) -> dict[str, str]:
    extra = {_METADATA: ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra[_METADATA])

"""Export of a run's EMA model to one file, from uint8 images to class probabilities, with class names.

Formats: safetensors, with the parameters and the configuration that rebuilds the network; a torch.export program; ONNX.
The exported programs include preprocessing, and so does the model rebuilt by `load_safetensors`.
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
_EXAMPLES = 2  # batch size for tracing; the exported program accepts any
_METADATA = "remixmatch.json"


class Predictor(nn.Module):
    """A network with preprocessing: (N, H, W, 3) uint8 images to (N, L) float32 probabilities.

    Args:
        network: Network in evaluation mode.
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
    """Write a network to a file; an existing file is replaced atomically.

    Args:
        network: Network on the CPU, in evaluation mode and float32.
        config: Configuration of its run.
        classes: Class names.
        sides: (H, W) of the images.
        to: Format, a key of SUFFIXES.
        path: The file.

    Raises:
        UserError: A package is missing, or the file cannot be written.
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
    file = io.BytesIO()  # not the file itself: torch aborts the process if it cannot be written
    torch.export.save(_program(network, sides), file, extra_files={_METADATA: json.dumps(metadata)})
    return file.getvalue()


def _to_onnx(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int]) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401  required by torch.onnx
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
    """Load a safetensors file written by `export`: the predictor, class names, and (H, W) of the images.

    Raises:
        UserError: The file cannot be read, or is not an exported model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not {"classes", "sides", "config"} <= metadata.keys():
        raise UserError(f"{path} was not written by remixmatch export")
    classes, (height, width) = tuple(json.loads(metadata["classes"])), json.loads(metadata["sides"])
    config = parse_config(metadata["config"], path)
    network = make_network(config, len(classes), torch.device("cpu"), (height, width), trained=True).eval().float()
    network.load_state_dict(tensors)
    return Predictor(network).eval(), classes, (height, width)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an exported file; its suffix determines the format."""
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

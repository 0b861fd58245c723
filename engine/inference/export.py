"""Export of a run's EMA model to one file, from uint8 images to class probabilities, with class names.

Formats: safetensors, with the parameters and the configuration that rebuilds the network; a torch.export program; ONNX.
The exported programs include normalization, and so does the model rebuilt by `load_safetensors`. A program for images
of any size resizes them, too.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.config.config import config_json, parse_config
from engine.errors import UserError, cannot_write
from engine.inference.resize import RULE, Resize
from engine.inference.trained import Trained
from engine.models.build import make_network
from engine.models.wide_resnet import TwoHeadNetwork
from pipelines.files import first_line, write_bytes

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
_EXAMPLES = 2  # Batch size for tracing; the exported program accepts any.
_METADATA = "remixmatch.json"


class Predictor(nn.Module):
    """A network with preprocessing: (N, H, W, 3) uint8 images to (N, L) float32 probabilities.

    Args:
        network: Network in evaluation mode.
        resize_to: Side to which images of any size are resized; None for images that have the network's size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: TwoHeadNetwork, resize_to: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.resize = Resize(resize_to) if resize_to else None
        self.register_buffer("mean", torch.tensor(network.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.resize(images) if self.resize else images.permute(0, 3, 1, 2).float()
        return self.network((pixels - self.mean) / self.std)[0].softmax(-1)


def export(trained: Trained, to: str, path: Path, resize: bool = False) -> None:
    """Write a model to a file; an existing file is replaced atomically. Equal models give equal files.

    Args:
        trained: The model; its network is moved to the CPU and converted to float32.
        to: Format, a key of SUFFIXES.
        path: The file.
        resize: Whether the exported program takes images of any size.

    Raises:
        UserError: A package is missing, the format has no programs to resize images, or the file cannot be written.
    """
    if resize and to == "safetensors":
        raise UserError("--with-resize needs --to torch or onnx: a safetensors file has parameters, but no program")
    network = trained.network.cpu().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    height, width = trained.sides
    sides = ("height", "width") if resize else trained.sides
    metadata = {
        "classes": json.dumps(trained.classes), "sides": json.dumps(trained.sides), "preset": trained.config.preset,
        "config": config_json(trained.config), "remixmatch-engine": version("remixmatch-engine"),
        "run": f"{trained.config.preset} seed {trained.config.seed}", "step": str(trained.step),
        "parameters_sha256": _digest(network),
        "input": f"images: (batch, {sides[0]}, {sides[1]}, 3) uint8, RGB",
        "output": f"probabilities: (batch, {len(trained.classes)}) float32",
        "resize": ("done by the model: " if resize else "to be done by the caller: ") + RULE.format(side=height),
        "mean": json.dumps(network.mean), "std": json.dumps(network.std),
        "normalization": "done by the model: (pixel - mean) / std of each channel, for pixels from 0 to 255",
    }  # fmt: skip
    if to == "safetensors":
        content = safetensors_bytes(network, metadata)
    else:
        content = {"torch": _to_torch, "onnx": _to_onnx}[to](network, metadata, (height, width), resize)
    try:
        write_bytes(path, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def _digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers, which are on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def safetensors_bytes(network: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of a network's parameters and buffers.

    A file has the length of its header, the header in JSON, and the tensors. The header is written again, since
    safetensors writes metadata in an order that changes from call to call.
    """
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in network.state_dict().items()}, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # Tensors start at a multiple of 8 bytes.
    return len(header).to_bytes(8, "little") + header + content[end:]


def _program(network: TwoHeadNetwork, sides: tuple[int, int], resize: bool) -> Any:
    height, width = sides
    dimensions = {0: torch.export.Dim("batch", min=1)}
    if resize:
        dimensions |= {1: torch.export.Dim("height", min=1), 2: torch.export.Dim("width", min=1)}
        height, width = height + 3, width + 5  # Examples of sizes, from which nothing may be concluded.
    predictor = Predictor(network, sides[0] if resize else None).eval()
    images = torch.zeros((_EXAMPLES, height, width, 3), dtype=torch.uint8)
    program = torch.export.export(predictor, (images,), dynamic_shapes={"images": dimensions})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # Paths of this machine.
    return program


def _to_torch(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int], resize: bool) -> bytes:
    file = io.BytesIO()  # not the file itself: torch aborts the process if it cannot be written
    torch.export.save(_program(network, sides, resize), file, extra_files={_METADATA: json.dumps(metadata)})
    return file.getvalue()


def _to_onnx(network: TwoHeadNetwork, metadata: dict[str, str], sides: tuple[int, int], resize: bool) -> bytes:
    try:
        import onnx
        import onnxscript  # noqa: F401  required by torch.onnx
    except ImportError:
        raise UserError("export --to onnx needs onnx: pip install 'remixmatch-engine[onnx]'") from None
    program = torch.onnx.export(
        _program(network, sides, resize),
        input_names=["images"],
        output_names=["probabilities"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for part in (graph, *graph.node):
        part.ClearField("metadata_props")  # Notes of the exporter, with paths of this machine.
    # The exporter names dimensions after torch's symbols.
    given = [each.dim_param for each in graph.input[0].type.tensor_type.shape.dim if each.dim_param]
    names = dict(zip(given, ("batch", "height", "width"), strict=False))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString(deterministic=True)


def load_safetensors(path: Path) -> tuple[Predictor, tuple[str, ...], tuple[int, int]]:
    """Load a safetensors file written by `export`: the predictor, class names, and (H, W) of the images.

    Raises:
        UserError: The file cannot be read, is not an exported model, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not {"classes", "sides", "config"} <= metadata.keys():
        raise UserError(f"{path} was not written by remixmatch export")
    try:
        classes, (height, width) = tuple(json.loads(metadata["classes"])), json.loads(metadata["sides"])
        config = parse_config(metadata["config"], path)
        network = make_network(config, len(classes), torch.device("cpu"), (height, width), trained=True).eval().float()
        network.load_state_dict(tensors)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); export the run again") from None
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

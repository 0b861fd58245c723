"""timm models as backbones, with a classifier and a rotation head on the pooled features.

timm is an optional dependency: `pip install 'remixmatch-engine[timm]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError, suggestion
from engine.models.wide_resnet import TwoHeadNetwork, initialize_linear
from pipelines.files import first_line


class Backbone(TwoHeadNetwork):
    """A timm model with its classifier replaced by a class head and a rotation head.

    Args:
        name: The model's name in timm, such as "resnet50".
        classes: L.
        sides: (H, W) of the images, for models with a fixed input size.
        seed: Seed of the initial weights.
        bn_momentum: Momentum of batch norm's running statistics, in PyTorch's convention.
        pretrained: Whether to start from timm's pretrained weights, which timm downloads unless they are in its cache.
        weights: File with weights to start from instead (safetensors or PyTorch), "" for none.

    Raises:
        UserError: timm is not installed or has no such model, or the weights cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        sides: tuple[int, int],
        seed: int = 0,
        bn_momentum: float = 0.001,
        pretrained: bool = False,
        weights: str = "",
    ) -> None:
        super().__init__()
        timm = _timm()
        if not timm.is_model(name):
            hint = suggestion(name, timm.list_models(), "timm.list_models() lists all models")
            raise UserError(f"--network: timm {timm.__version__} has no model '{name}'; {hint}")
        known = timm.models.get_pretrained_cfg(name)
        options: dict[str, Any] = {"img_size": sides} if known is not None and known.fixed_input_size else {}
        # timm draws from torch's global generator, whose state is restored.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.body = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
            except Exception as error:  # The libraries below raise many types.
                if not pretrained:
                    raise
                raise UserError(
                    f"--pretrained: cannot download the weights of timm:{name} ({first_line(error)}); "
                    "if this machine has no network access, use --weights FILE"
                ) from error
            features = getattr(self.body, "head_hidden_size", None) or self.body.num_features
            self.head, self.rotation_head = nn.Linear(features, classes), nn.Linear(features, 4)
        if weights:
            _load(self.body, Path(weights))
        for module in self.body.modules():
            if hasattr(module, "running_mean"):
                module.momentum = bn_momentum
        generator = torch.Generator().manual_seed(seed)
        for head in (self.head, self.rotation_head):
            initialize_linear(head, generator)
        data = timm.data.resolve_model_data_config(self.body)
        self.mean = tuple(255.0 * value for value in data["mean"])
        self.std = tuple(255.0 * value for value in data["std"])

    def forward(self, images: Tensor, track: bool = True) -> tuple[Tensor, Tensor]:
        """Map normalized images (N, 3, H, W) to class logits (N, L) and rotation logits (N, 4).

        Args:
            images: The images.
            track: Whether to update the running statistics of batch norm in training.
        """
        if self.training and not track:
            # The batch norm of other libraries always updates its statistics in training: here it updates copies.
            copies = {name: buffer.clone() for name, buffer in self.body.named_buffers()}
            features = torch.func.functional_call(self.body, copies, (images,))
        else:
            features = self.body(images)
        return self.head(features), self.rotation_head(features)


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError:
        raise UserError("--network timm:... requires timm; run: pip install 'remixmatch-engine[timm]'") from None
    return timm


def _load(body: nn.Module, path: Path) -> None:
    """Load the weights of a backbone and ignore those of its classifier.

    Raises:
        UserError: The file cannot be read, or is for a different model.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            saved = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # A damaged file raises many types.
        raise UserError(f"--weights {path} cannot be read ({first_line(error)})") from None
    if isinstance(saved.get("state_dict"), dict):  # The format of many training scripts.
        saved = saved["state_dict"]  # type: ignore[assignment]
    own = body.state_dict()
    missing = [name for name in own if name not in saved]
    reshaped = [name for name in own if name in saved and saved[name].shape != own[name].shape]
    if missing or reshaped:
        name = (missing or reshaped)[0]
        problem = f"{name} is missing" if missing else f"{name} has another shape"
        raise UserError(f"--weights {path} is for a different model: {problem}")
    body.load_state_dict({name: saved[name] for name in own})

"""Networks of timm as backbones: any of its models, with a classifier and a rotation head on its pooled features.

timm is an optional extra: `pip install 'remixmatch-engine[timm]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError, unknown
from engine.models.wide_resnet import TwoHeadNetwork, initialize_linear
from pipelines.files import first_line


class Backbone(TwoHeadNetwork):
    """A model of timm without its own classifier, and two linear heads side by side.

    Args:
        name: as timm knows it, such as "resnet50".
        classes: L.
        sides: (H, W) of the images, for models that are built for one size.
        seed: of the initial weights.
        bn_momentum: of batch norm's running statistics, in PyTorch's convention.
        pretrained: start from timm's weights for that name, which it downloads where they are not in its cache.
        weights: a file with the backbone's weights instead (safetensors, or torch's), "" for none.

    Raises:
        UserError: timm is not installed, has no such model, or its weights cannot be had.
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
            kind, listed = f"model of timm {timm.__version__}", "timm.list_models() lists them"
            raise UserError(f"--network: {unknown(kind, name, timm.list_models(), listed)}")
        known = timm.models.get_pretrained_cfg(name)
        options: dict[str, Any] = {"img_size": sides} if known is not None and known.fixed_input_size else {}
        # timm draws from torch's global generator, which is left as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.body = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
            except Exception as error:  # of the hub, of the network, or of a file: as many kinds as there are libraries
                if not pretrained:
                    raise
                raise UserError(
                    f"--pretrained: the weights of timm:{name} cannot be had ({first_line(error)}); "
                    "without a network give their file: --weights FILE"
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
        """(N, 3, H, W) normalised to (N, L) class and (N, 4) rotation logits; see `WideResNet.forward`."""
        untracked = self.training and not track
        if untracked:
            # batch norm of other libraries always moves its statistics in training
            before = self.running_statistics()
        features = self.body(images)
        if untracked:
            self.set_running_statistics(before)
        return self.head(features), self.rotation_head(features)


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError:
        raise UserError("--network timm:... needs timm: pip install 'remixmatch-engine[timm]'") from None
    return timm


def _load(body: nn.Module, path: Path) -> None:
    """Loads a backbone's weights; those of a classifier on top of it are left out.

    Raises:
        UserError: the file cannot be read, or is of another model.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(f"--weights {path} cannot be read ({first_line(error)})") from None
    if isinstance(found.get("state_dict"), dict):  # as training scripts save them
        found = found["state_dict"]  # type: ignore[assignment]
    own = body.state_dict()
    missing = [name for name in own if name not in found]
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    if missing or other:
        name = (missing or other)[0]
        problem = f"has no {name}" if missing else f"has another shape of {name}"
        raise UserError(f"--weights {path} is of another model: it {problem}")
    body.load_state_dict({name: found[name] for name in own})

#!/usr/bin/env bash
# torch 2.15.0: fused optimizers on CPUs pair parameter and gradient in memory order, and update the wrong elements.
#
# Expected:   fused=True gives the results of foreach=True up to rounding, whatever the strides of parameter and gradient.
# Observed:   With a channels-last parameter and a gradient of the same shape in the default order, each element is updated with
#             the gradient of another one. SGD, Adam, AdamW and Adagrad are affected. No error or warning.
# Affected:   Channels-last training on CPUs with gradients that autograd did not lay out itself: torch.autograd.grad with a
#             penalty on flattened weights, gradients from a flat buffer, another process, or a checkpoint. loss.backward()
#             is safe, since it gives each gradient the strides of its parameter.
# Workaround: Assign `torch.empty_like(parameter).copy_(gradient)` to `parameter.grad`, or use foreach=True.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW


def train(optimizer, relaid, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    optimizer = optimizer(layer.parameters(), lr=0.1, **options)
    for _ in range(5):
        loss = layer(images).square().mean() + 0.01 * layer.weight.flatten().square().sum()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        for parameter, gradient in zip(layer.parameters(), gradients):
            parameter.grad = torch.empty_like(parameter).copy_(gradient) if relaid else gradient
        optimizer.step()
    return layer.weight.detach(), layer.weight.stride() == layer.weight.grad.stride()


for optimizer in (SGD, Adam, AdamW, Adagrad):
    for relaid in (False, True):
        right, _ = train(optimizer, relaid, foreach=True)
        fused, same = train(optimizer, relaid, fused=True)
        error = (fused - right).abs().max().item()
        size = "more than 0.001" if error > 1e-3 else "less than 0.00001" if error < 1e-5 else error
        print(f"{optimizer.__name__}: same strides {same}, fused differs from foreach by {size}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
SGD: same strides False, fused differs from foreach by more than 0.001
SGD: same strides True, fused differs from foreach by less than 0.00001
Adam: same strides False, fused differs from foreach by more than 0.001
Adam: same strides True, fused differs from foreach by less than 0.00001
AdamW: same strides False, fused differs from foreach by more than 0.001
AdamW: same strides True, fused differs from foreach by less than 0.00001
Adagrad: same strides False, fused differs from foreach by more than 0.001
Adagrad: same strides True, fused differs from foreach by less than 0.00001
EXPECTED

#!/usr/bin/env bash
# torch 2.15.0: with a tensor as learning rate, all parameter groups share it, and schedulers set the last group's rate for all.
#
# Expected:   A scheduler gives the same rates with lr=torch.tensor(0.1), which is meant for compiled and captured steps, as
#             with lr=0.1.
# Observed:   An optimizer puts the one tensor that it gets into every group without a rate of its own, and schedulers write
#             into it in place. What is set for one group replaces what was set for those before it. LambdaLR, MultiplicativeLR,
#             OneCycleLR, CyclicLR and SWALR with a value per group apply the last one to all groups. ReduceLROnPlateau
#             multiplies once per group: two groups, as for parameters with and without weight decay, get 0.001 instead of 0.01,
#             and five get 1e-06. load_state_dict() keeps the groups tied. No error or warning. Schedulers with one schedule for
#             all groups are right.
# Affected:   Compiled or captured optimizer steps with more than one group: separate rates for backbone and head, and reduction
#             on plateaus. With a single group, or with floats, everything is as it should be.
# Workaround: Give each group a tensor of its own: {"params": ..., "lr": rate.clone()}.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

cases = {
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.1**step]),
    "MultiplicativeLR": lambda optimizer: schedulers.MultiplicativeLR(optimizer, [lambda step: 1.0, lambda step: 0.1]),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=[0.1, 1.0], total_steps=9),
    "CyclicLR": lambda optimizer: schedulers.CyclicLR(optimizer, [0.1, 0.2], [1.0, 2.0], 2, cycle_momentum=False),
    "SWALR": lambda optimizer: SWALR(optimizer, [0.1, 0.01], anneal_epochs=2),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=4),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0),
}


def groups(number=2):
    return [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(number)]


def rates(scheduler_for, parameter_groups, rate):
    optimizer = torch.optim.SGD(parameter_groups, lr=rate)
    scheduler = scheduler_for(optimizer)
    for _ in range(2):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    return [round(float(group["lr"]), 6) for group in optimizer.param_groups]


for name, scheduler_for in cases.items():
    own = [{**group, "lr": torch.tensor(0.1)} for group in groups()]
    print(
        f"{name}: float", rates(scheduler_for, groups(), 0.1),
        "tensor", rates(scheduler_for, groups(), torch.tensor(0.1)),
        "own tensors", rates(scheduler_for, own, torch.tensor(0.1)),
    )
print("five groups:", rates(cases["ReduceLROnPlateau"], groups(5), torch.tensor(0.1)))
optimizer, loaded = (torch.optim.SGD(groups(), lr=rate) for rate in (torch.tensor(0.1), 0.1))
loaded.load_state_dict(optimizer.state_dict())
print("tied after loading:", loaded.param_groups[0]["lr"] is loaded.param_groups[1]["lr"])
adam = torch.optim.AdamW(groups(), lr=torch.tensor(0.1), fused=True)
print("tied in AdamW:", adam.param_groups[0]["lr"] is adam.param_groups[1]["lr"])
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
LambdaLR: float [0.1, 0.001] tensor [0.001, 0.001] own tensors [0.1, 0.001]
MultiplicativeLR: float [0.1, 0.001] tensor [0.001, 0.001] own tensors [0.1, 0.001]
OneCycleLR: float [0.099442, 0.994415] tensor [0.994415, 0.994415] own tensors [0.099442, 0.994415]
CyclicLR: float [1.0, 2.0] tensor [2.0, 2.0] own tensors [1.0, 2.0]
SWALR: float [0.1, 0.01] tensor [0.01, 0.01] own tensors [0.1, 0.01]
CosineAnnealingLR: float [0.05, 0.05] tensor [0.05, 0.05] own tensors [0.05, 0.05]
ReduceLROnPlateau: float [0.01, 0.01] tensor [0.001, 0.001] own tensors [0.01, 0.01]
five groups: [1e-06, 1e-06, 1e-06, 1e-06, 1e-06]
tied after loading: True
tied in AdamW: True
EXPECTED

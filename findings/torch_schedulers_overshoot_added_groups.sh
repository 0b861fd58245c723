#!/usr/bin/env bash
# torch 2.15.0: a parameter group added under a warm-up ends far above its learning rate.
#
# Expected:   A group that is added to the optimizer after the scheduler was created follows the same schedule, or keeps its
#             learning rate, or raises.
# Observed:   It depends on the scheduler. LinearLR multiplies the present rate of every group by the ratio of two steps of the
#             schedule. A group that was not there at the start misses the division by start_factor, and the full warm-up from
#             0.1 leaves it at 10 times its rate; added halfway, at 1.8 times. No warning. LambdaLR raises a ValueError with
#             nothing about groups in it, and StepLR skips the drops of the past.
# Affected:   Fine-tuning that unfreezes layers or adds a head after the scheduler was created, with warm-up.
# Workaround: Add all groups before creating the scheduler, frozen ones with requires_grad=False; or create a new scheduler.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, StepLR

schedulers = {
    "LinearLR": lambda optimizer: LinearLR(optimizer, start_factor=0.1, total_iters=10),
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=4),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10)),
}
for name, create in schedulers.items():
    for added in (0, 5):
        first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        optimizer = torch.optim.SGD([first], lr=1.0)
        scheduler = create(optimizer)
        try:
            for step in range(10):
                if step == added:
                    optimizer.add_param_group({"params": [second], "lr": 1.0})
                optimizer.step()
                scheduler.step()
            print(f"{name}, group added before step {added}: rates {[round(group['lr'], 3) for group in optimizer.param_groups]}")
        except ValueError as error:
            print(f"{name}, group added before step {added}: {error}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
LinearLR, group added before step 0: rates [1.0, 10.0]
LinearLR, group added before step 5: rates [1.0, 1.818]
StepLR, group added before step 0: rates [0.01, 0.01]
StepLR, group added before step 5: rates [0.01, 0.1]
LambdaLR, group added before step 0: zip() argument 2 is shorter than argument 1
LambdaLR, group added before step 5: zip() argument 2 is shorter than argument 1
EXPECTED

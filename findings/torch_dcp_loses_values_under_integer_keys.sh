#!/usr/bin/env bash
# torch 2.15.0: torch.distributed.checkpoint does not restore Python values under integer keys; the old values stay.
#
# Expected:   After dcp.load(state), each value of a nested dictionary is the saved one, or an error tells that a key is
#             missing.
# Observed:   Keys of dictionaries are turned into strings for the checkpoint. A number saved under {1: ...} is loaded under
#             "1", as a new entry, and the entry 1 keeps the value it had before. Tensors are right, since they are filled in
#             place. No error or warning; torch.save and torch.load restore all of it.
# Affected:   Anyone who keeps thresholds per class, counts per label or scores per epoch as {number: number}, and optimizers
#             that count steps in a Python integer, as the state in their state_dict() has integer keys. AdamP 0.3.0 goes on at
#             step 1 instead of 100 with the moments of step 100, so that its bias correction is wrong: the next update is a
#             quarter too small here.
# Workaround: Use strings as keys and convert them after loading, or keep the values in tensors. For optimizers, use
#             get_state_dict and set_state_dict of torch.distributed.checkpoint.state_dict, which name parameters by strings.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import io
import sys
import warnings

import adamp
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.simplefilter("ignore")


def through_checkpoint(name, saved, target):
    dcp.save(saved, checkpoint_id=f"{sys.argv[1]}/{name}", no_dist=True)
    dcp.load(target, checkpoint_id=f"{sys.argv[1]}/{name}", no_dist=True)
    return target


print("numbers:", through_checkpoint("a", {"thresholds": {0: 0.95, 1: 0.7}}, {"thresholds": {0: 0.5, 1: 0.5}}))
print("tensors:", through_checkpoint("b", {"counts": {7: torch.tensor(3)}}, {"counts": {7: torch.tensor(0)}}))
print("strings:", through_checkpoint("c", {"thresholds": {"0": 0.95}}, {"thresholds": {"0": 0.5}}))


def train(steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = adamp.AdamP(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    return model, optimizer


def update(model, optimizer):
    before = model.weight.detach().clone()
    optimizer.step()
    return f"step {optimizer.state[model.weight]['step']}, update {(model.weight - before).abs().max():.4f}"


def resumed(name):
    model, optimizer = train(100)
    fresh_model, fresh = train(1)  # one step creates the state to load into
    fresh_model.load_state_dict(model.state_dict())
    if name == "dcp":
        loaded = through_checkpoint("d", {"optimizer": optimizer.state_dict()}, {"optimizer": fresh.state_dict()})
        fresh.load_state_dict(loaded["optimizer"])
    elif name == "torch.save":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file))
    else:
        names = ("model", "optimizer")
        saved, target = (dict(zip(names, get_state_dict(*pair))) for pair in ((model, optimizer), (fresh_model, fresh)))
        loaded = through_checkpoint("e", saved, target)
        set_state_dict(fresh_model, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    fresh_model.weight.grad = model.weight.grad
    return update(fresh_model, fresh)


print("not interrupted:", update(*train(100)))
for name in ("dcp", "torch.save", "get_state_dict"):
    print(f"{name}:", resumed(name))
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6 adamp==0.3.0
"$folder/env/bin/python" "$folder/probe.py" "$folder" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
numbers: {'thresholds': {0: 0.5, 1: 0.5, '0': 0.95, '1': 0.7}}
tensors: {'counts': {7: tensor(3)}}
strings: {'thresholds': {'0': 0.95}}
not interrupted: step 101, update 0.0100
dcp: step 2, update 0.0076
torch.save: step 101, update 0.0100
get_state_dict: step 101, update 0.0100
EXPECTED

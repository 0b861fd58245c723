#!/usr/bin/env bash
# DALI 2.4.0, dynamic mode: every tensor and batch is true in a condition, whatever it holds.
#
# Expected:   `if tensor > 5:` compares, as with a NumPy array or a torch tensor of one element; or it raises, as with several.
# Observed:   nvidia.dali.experimental.dynamic's Tensor and Batch define no truth value, so Python takes every object for true.
#             bool(tensor > 5) is True for 3, `not tensor` is always False, and `value in [tensor]` always finds it. In the same
#             way max() and min() return an operand by its position and not by its value. Comparisons themselves are right.
# Affected:   Anyone who moves a loader from pipelines, where `if` is rewritten into a condition per sample, to dynamic mode:
#             augmentations with a probability are applied always, and checks for empty or too small images never fire.
# Workaround: Convert first: bool(np.asarray(tensor > 5)), and loop over the tensors of a batch.
#
# Requires python3 with venv, and pip; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import nvidia.dali.experimental.dynamic as ndd

three = ndd.as_tensor(np.array(3.0))
print("comparison:", np.asarray(three > 5).item(), "as a condition:", bool(three > 5))
print("zero:", bool(ndd.as_tensor(np.array(0))), "false:", bool(ndd.as_tensor(np.array(False))), "not:", not three - 3)
print("4 in [3]:", 4.0 in [three])
batch = ndd.as_batch([np.array(1.0), np.array(2.0)])
print("batch comparison:", [np.asarray(value).item() for value in batch > 5], "as a condition:", bool(batch > 5))
applied = sum(1 for _ in range(100) if ndd.random.coin_flip(probability=0.1))
print("applied with probability 0.1:", applied, "of 100")
flips = [bool(np.asarray(ndd.random.coin_flip(probability=0.1))) for _ in range(100)]
print("converted first:", "fewer than 50" if sum(flips) < 50 else "at least 50")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nvidia-dali-cuda130==2.4.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
comparison: False as a condition: True
zero: True false: True not: False
4 in [3]: True
batch comparison: [False, False] as a condition: True
applied with probability 0.1: 100 of 100
converted first: fewer than 50
EXPECTED

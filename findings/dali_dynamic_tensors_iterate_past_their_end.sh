#!/usr/bin/env bash
# DALI 2.4.0: iterating over a tensor of the dynamic mode does not stop at its last element.
#
# Expected:   `for row in tensor` yields the rows and stops, as in numpy and torch; or it raises TypeError, as len(tensor) does.
# Observed:   The class has `__getitem__` but no `__iter__`, so Python indexes 0, 1, 2, ... until an IndexError. None comes: in the
#             modes `eager` (the default) and `deferred` an index past the end gives another tensor, which fails only when it is
#             read, with a RuntimeError. In `sync_cpu` the loop ends with that RuntimeError. So list(tensor) does not return,
#             `a, b, c = tensor` finds too many values, and enumerate(tensor) runs past the end. Batches stop.
# Affected:   Loops over the rows of boxes, landmarks or labels in code that moves from pipelines to the dynamic mode.
# Workaround: Iterate over range(tensor.shape[0]), over np.asarray(tensor) on a CPU, or over a batch.
#
# Requires python3 with venv, pip, and 1 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
from itertools import islice

import numpy as np
import nvidia.dali.experimental.dynamic as ndd

LIMIT = 10  # No loop here is without end.


def unpacked(tensor):
    a, b, c = tensor
    return a, b, c


def tried(act):
    try:
        return act()
    except Exception as error:
        return f"{type(error).__name__}"


tensor = ndd.as_tensor(np.arange(3))
print("shape:", tensor.shape, "length:", tried(lambda: len(tensor)))
print("elements of a loop over 3 values, at most 10:", len(list(islice(tensor, LIMIT))))
print("read one by one:", tried(lambda: [np.asarray(value).item() for value in islice(tensor, LIMIT)]))
print("unpacked into three names:", tried(lambda: unpacked(tensor)))
for mode in ("eager", "deferred", "sync_cpu"):
    with getattr(ndd.EvalMode, mode):
        print(f"{mode}:", tried(lambda: len(list(islice(ndd.as_tensor(np.arange(3)), LIMIT)))))
print("a batch of two:", len(list(islice(ndd.as_batch([np.arange(3), np.arange(3)]), LIMIT))))
print("over the shape:", [np.asarray(tensor[at]).item() for at in range(tensor.shape[0])])
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nvidia-dali-cuda130==2.4.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
shape: (3,) length: TypeError
elements of a loop over 3 values, at most 10: 10
read one by one: RuntimeError
unpacked into three names: ValueError
eager: 10
deferred: 10
sync_cpu: RuntimeError
a batch of two: 2
over the shape: [0, 1, 2]
EXPECTED

#!/usr/bin/env bash
# DALI 2.4.0: feeding a CPU torch tensor to a CPU-only pipeline asks torch for the current CUDA stream.
#
# Expected:   A pipeline with device_id=None accepts a CPU tensor as it accepts a NumPy array, with any build of torch.
# Observed:   feed_input() takes torch tensors for GPU data until it has asked torch for the stream. With a CUDA build of torch
#             and no NVIDIA driver, torch raises. The same memory as a NumPy array works, and so does a CPU build of torch.
# Affected:   Anyone who develops or tests on a machine without a GPU with the torch that `pip install torch` brings.
# Workaround: Pass tensor.numpy(), which shares the memory.
#
# Requires python3 with venv, pip, 6 GB of disk, and no NVIDIA driver. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import nvidia.dali as dali
import torch


@dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
def graph():
    return dali.fn.external_source(name="values", dtype=dali.types.UINT8, ndim=1)


for name, batch in (("numpy", [np.arange(3, dtype=np.uint8)]), ("torch", [torch.arange(3, dtype=torch.uint8)])):
    pipeline = graph()
    pipeline.build()
    try:
        pipeline.feed_input("values", batch)
        print(name, np.asarray(pipeline.run()[0].at(0)).tolist())
    except Exception as error:
        print(name, type(error).__name__, str(error).splitlines()[0][:40])
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nvidia-dali-cuda130==2.4.0 torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
numpy [0, 1, 2]
torch RuntimeError Found no NVIDIA driver on your system. P
EXPECTED

#!/usr/bin/env bash
# torch 2.15.0, gloo: destroy_process_group leaves the group's threads running if DistributedDataParallel was used.
#
# Expected:   destroy_process_group ends the group, including its threads, as it does after plain collectives.
# Observed:   The first DistributedDataParallel of a process imports torch.distributed.nn.functional. Ten functions there have
#             the default argument group.WORLD, evaluated at import: the current group. These references keep the group
#             and its three threads until the process exits, even after the module is deleted and garbage is collected.
# Affected:   Everyone who trains on CPUs with several ranks. Rarely, and only on busy machines, a rank that had finished its
#             work ended with SIGABRT, and torchrun stopped the others. With the workaround no thread is left.
# Workaround: Import torch.distributed.nn.functional before init_process_group. Before destroy_process_group, delete the
#             module and call gc.collect().
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Linux only. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

case = sys.argv[1]
if case == "imported first":
    import torch.distributed.nn.functional  # noqa: F401
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if case == "all_reduce":
    dist.all_reduce(torch.zeros(3))
else:
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
gc.collect()
dist.destroy_process_group()
if case == "DistributedDataParallel":
    from torch.distributed.nn import functional

    held = [f for f in vars(functional).values() if any("ProcessGroup" in str(d) for d in getattr(f, "__defaults__", None) or ())]
    print("functions that hold the group:", len(held))
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(f"{case}: {sum('gloo' in name for name in names)} threads left")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
for case in "all_reduce" "DistributedDataParallel" "imported first"; do
    "$folder/env/bin/python" "$folder/probe.py" "$case"
done | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
all_reduce: 0 threads left
functions that hold the group: 10
DistributedDataParallel: 3 threads left
imported first: 0 threads left
EXPECTED

#!/usr/bin/env bash
# torch 2.15.0, gloo: all_reduce and broadcast work in memory order, so ranks with different strides mix up elements.
#
# Expected:   A collective acts on elements by index, as every other operator does, or raises if strides differ between ranks.
#             all_gather and all_gather_into_tensor do the former, send raises for a tensor that is not contiguous.
# Observed:   With a contiguous tensor on rank 0 and a channels-last tensor of the same shape on rank 1, all_reduce adds
#             different elements and broadcast delivers permuted ones. No error or warning.
# Affected:   Anyone who synchronizes weights, averages or gradients by hand: rank 0 loads a checkpoint (contiguous) and the
#             others build the model in channels-last; or one rank gets a gradient with other strides.
#             DistributedDataParallel compares strides when it is built, and other code does not.
# Workaround: Call collectives on `tensor.contiguous()` and copy the result back, or convert the model on all ranks after loading.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist


def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    values = torch.arange(8.0).reshape(1, 2, 2, 2)
    layout = torch.contiguous_format if rank == 0 else torch.channels_last
    reduced = values.clone().to(memory_format=layout)
    dist.all_reduce(reduced)
    sent = (values if rank == 0 else torch.zeros_like(values)).clone().to(memory_format=layout)
    dist.broadcast(sent, 0)
    gathered = [torch.zeros_like(values) for _ in range(2)]
    dist.all_gather(gathered, values.clone().to(memory_format=layout))
    copied = values.clone().to(memory_format=layout).contiguous()
    dist.all_reduce(copied)
    if rank == 1:
        print("all_reduce:", reduced.flatten().int().tolist(), "instead of", (2 * values).flatten().int().tolist())
        print("broadcast:", sent.flatten().int().tolist(), "instead of", values.flatten().int().tolist())
        print("all_gather is right:", all(torch.equal(part, values) for part in gathered))
        print("all_reduce of contiguous tensors is right:", torch.equal(copied, 2 * values), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" "$folder/rendezvous" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
all_reduce: [0, 3, 6, 9, 5, 8, 11, 14] instead of [0, 2, 4, 6, 8, 10, 12, 14]
broadcast: [0, 2, 4, 6, 1, 3, 5, 7] instead of [0, 1, 2, 3, 4, 5, 6, 7]
all_gather is right: True
all_reduce of contiguous tensors is right: True
EXPECTED

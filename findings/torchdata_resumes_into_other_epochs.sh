#!/usr/bin/env bash
# torchdata 0.11.0: a resumed StatefulDataLoader repeats samples of the epoch and loses others, except with shuffle=True.
#
# Expected:   A loader that is rebuilt in the same way, with the same seeds, and given the saved state_dict() continues as the
#             uninterrupted run does, with any sampler of torch and any number of workers.
# Observed:   Only shuffle=True without a generator does so. SubsetRandomSampler and WeightedRandomSampler, even with a seeded
#             generator of their own, are rebuilt at their first epoch: in a later one, the rest of the first permutation
#             follows the start of the present one. With shuffle=True and a seeded generator, the epoch ends correctly, and the
#             next ones differ from the uninterrupted run; this happens without workers and not with one. No error or warning.
#             The documentation says that samplers without a state are wound forward, not that their permutation is another one,
#             and that state in the sampler is for efficiency.
# Affected:   Checkpoints within an epoch with balanced or labeled-subset sampling; and tests of resuming, which pass in the
#             first epoch, or with workers, and prove nothing for the others.
# Workaround: Seed the generator with the number of the epoch before every epoch, also before the one that is resumed.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import warnings

import torch
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.simplefilter("ignore")
samples = list(range(12))
arguments = {
    "shuffle": lambda generator: {"shuffle": True},
    "shuffle, generator": lambda generator: {"shuffle": True, "generator": generator},
    "subset": lambda generator: {"sampler": SubsetRandomSampler(samples, generator)},
    "weighted": lambda generator: {"sampler": WeightedRandomSampler([1.0] * 12, 12, False, generator)},
}


def flat(batches):
    return [sample for batch in batches for sample in batch.tolist()]


class Run:
    def __init__(self, name, workers, seed_epochs):
        torch.manual_seed(0)
        self.generator, self.seed_epochs = torch.Generator().manual_seed(3), seed_epochs
        self.loader = StatefulDataLoader(samples, 3, num_workers=workers, **arguments[name](self.generator))

    def epoch(self, number):
        if self.seed_epochs:
            self.generator.manual_seed(number)
        return self.loader


def resume(epoch, *options):
    run = Run(*options)
    expected = [flat(run.epoch(number)) for number in range(4)]
    run = Run(*options)
    for number in range(epoch):
        flat(run.epoch(number))
    batches = iter(run.epoch(epoch))
    seen = flat([next(batches), next(batches)])
    state = run.loader.state_dict()
    run = Run(*options)
    run.loader.load_state_dict(state)
    seen += flat(run.epoch(epoch))
    words = {True: "same", False: "other"}
    following = flat(run.epoch(epoch + 1))
    return f"{words[seen == expected[epoch]]}, {len(set(seen))} of 12; then {words[following == expected[epoch + 1]]}"


cases = [(epoch, workers) for epoch in (0, 2) for workers in (0, 1)]
for epoch, workers in cases:
    print("in epoch", epoch, "with", workers, "workers:")
    for name in arguments:
        print(f"    {name}:", resume(epoch, name, workers, False))
seeded = {resume(epoch, name, workers, True) for epoch, workers in cases for name in arguments}
print("seeded before each epoch, all cases:", seeded)
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchdata==0.11.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
in epoch 0 with 0 workers:
    shuffle: same, 12 of 12; then same
    shuffle, generator: same, 12 of 12; then other
    subset: same, 12 of 12; then same
    weighted: same, 12 of 12; then same
in epoch 0 with 1 workers:
    shuffle: same, 12 of 12; then same
    shuffle, generator: same, 12 of 12; then same
    subset: same, 12 of 12; then same
    weighted: same, 12 of 12; then same
in epoch 2 with 0 workers:
    shuffle: same, 12 of 12; then same
    shuffle, generator: same, 12 of 12; then other
    subset: other, 9 of 12; then other
    weighted: other, 9 of 12; then other
in epoch 2 with 1 workers:
    shuffle: same, 12 of 12; then same
    shuffle, generator: same, 12 of 12; then same
    subset: other, 9 of 12; then other
    weighted: other, 9 of 12; then other
seeded before each epoch, all cases: {'same, 12 of 12; then same'}
EXPECTED

#!/usr/bin/env bash
# numpy 2.4.6: with one seed, the first 40 of Generator.choice(n, 250, replace=False) have nothing to do with choice(n, 40).
#
# Expected:   Without replacement and with one seed, a larger choice contains the smaller one, as with RandomState.choice,
#             RandomState.permutation(n)[:k] and torch.randperm(n)[:k].
# Observed:   RandomState.choice nests at every size. Generator.choice does not: its result depends on the number drawn from the
#             first element on, so that 10, 40, 100 and 250 draws from 1000 share only what chance gives. random.sample nests
#             except where a larger sample makes it change its algorithm.
# Affected:   Anyone who compares label budgets (40, 250 and 4000 labels). Moving a split from RandomState to default_rng turns
#             nested labeled sets into independent ones, which adds the variance of the sample to the effect of its size.
# Workaround: Draw one permutation and cut it: rng.permutation(n)[:k].
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np

samplers = {
    "RandomState.choice": lambda n, k: np.random.RandomState(0).choice(n, k, replace=False),
    "Generator.choice": lambda n, k: np.random.default_rng(0).choice(n, k, replace=False),
    "Generator.permutation": lambda n, k: np.random.default_rng(0).permutation(n)[:k],
}
for n, sizes in ((1000, (10, 40, 100, 250)), (50000, (40, 250, 1000, 4000))):
    for name, sample in samplers.items():
        chosen = [set(sample(n, k).tolist()) for k in sizes]
        shared = [len(a & b) for a, b in zip(chosen, chosen[1:])]
        print(f"{name}, {sizes} of {n}: in the next larger set {shared}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
RandomState.choice, (10, 40, 100, 250) of 1000: in the next larger set [10, 40, 100]
Generator.choice, (10, 40, 100, 250) of 1000: in the next larger set [0, 4, 23]
Generator.permutation, (10, 40, 100, 250) of 1000: in the next larger set [10, 40, 100]
RandomState.choice, (40, 250, 1000, 4000) of 50000: in the next larger set [40, 250, 1000]
Generator.choice, (40, 250, 1000, 4000) of 50000: in the next larger set [1, 3, 85]
Generator.permutation, (40, 250, 1000, 4000) of 50000: in the next larger set [40, 250, 1000]
EXPECTED

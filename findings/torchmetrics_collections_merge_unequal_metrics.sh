#!/usr/bin/env bash
# torchmetrics 1.9.0: a MetricCollection merges metrics of different settings for good if their first batch happens to agree.
#
# Expected:   A collection gives the values that its metrics give alone. Metrics share a state only if they count the same.
# Observed:   After the first update(), metrics with equal states are merged, whatever their threshold, ignore_index or other
#             settings. From then on only the first of them is updated, and all of them report its counts. If the first batch
#             has no score between 0.5 and 0.95, accuracies at these two thresholds stay equal forever; if it has no ignored
#             label, ignore_index applies to every metric or to none. The documentation says that members of such a group differ
#             only in how they compute. No error or warning; reset() and clone() keep it. Calling the collection instead of
#             update() is right.
# Affected:   Evaluation at several thresholds, with and without ignored labels, or of masks of pseudo-labels; mostly with small
#             batches, first batches sorted by class, and models that are sure or constant at first.
# Workaround: MetricCollection(metrics, compute_groups=False).
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

thresholds = {"above 50 %": BinaryAccuracy(threshold=0.5), "above 95 %": BinaryAccuracy(threshold=0.95)}
scores = [(torch.tensor([0.1, 0.99]), torch.tensor([0, 1]))] + 3 * [(torch.tensor([0.7, 0.8]), torch.tensor([1, 1]))]
ignoring = {
    "all": MulticlassAccuracy(3, average="micro"),
    "without 0": MulticlassAccuracy(3, average="micro", ignore_index=0),
}
labels = [(torch.tensor([1, 2]), torch.tensor([1, 2]))] + 3 * [(torch.tensor([1, 1]), torch.tensor([0, 1]))]


def show(name, values):
    print(f"{name}:", {key: round(value.item(), 3) for key, value in sorted(values.items())})


for metrics, batches in ((thresholds, scores), (ignoring, labels)):
    for name, metric in metrics.items():
        for batch in batches:
            metric.update(*batch)
    show("alone", {name: metric.compute() for name, metric in metrics.items()})
    for name, order, options in (
        ("collection", batches, {}),
        ("other order", batches[::-1], {}),
        ("compute_groups=False", batches, {"compute_groups": False}),
    ):
        collection = MetricCollection({name: metric.clone() for name, metric in metrics.items()}, **options)
        collection.reset()
        for batch in order:
            collection.update(*batch)
        show(name, collection.compute())
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchmetrics==1.9.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
alone: {'above 50 %': 1.0, 'above 95 %': 0.25}
collection: {'above 50 %': 1.0, 'above 95 %': 1.0}
other order: {'above 50 %': 1.0, 'above 95 %': 0.25}
compute_groups=False: {'above 50 %': 1.0, 'above 95 %': 0.25}
alone: {'all': 0.625, 'without 0': 1.0}
collection: {'all': 0.625, 'without 0': 0.625}
other order: {'all': 0.625, 'without 0': 1.0}
compute_groups=False: {'all': 0.625, 'without 0': 1.0}
EXPECTED

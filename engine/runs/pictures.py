"""The two images of a run: curves.png, and views.png with a grid of views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch

from engine.method.losses import LOSSES
from engine.runs.history import SampleViews
from pipelines.ctaugment import describe
from pipelines.files import atomic_write
from pipelines.plan import make_plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from engine.training.feed import Feed

GRID_ROWS = 6
GRID_STRONG = 8


def draw_curves(metrics: Sequence[dict[str, float]], path: Path) -> None:
    """Plot test accuracy, losses and alignment over the steps.

    Args:
        metrics: The result of `progress.read_metrics`.
        path: The PNG file.
    """

    def series(name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    axes[0].plot(*series("test_accuracy"))
    axes[0].set(title="test accuracy of the EMA model", xlabel="step", ylabel="%")
    for name in LOSSES:
        axes[1].plot(*series(name), label=name)
    axes[1].set(title="losses", xlabel="step")
    axes[1].legend()
    labels = {
        "alignment_gap": "|p(y) - p~(y)| / 2",
        "confidence": "confidence of pseudo-labels",
        "omega": "CTAugment's omega (probes)",
    }
    for name, label in labels.items():
        axes[2].plot(*series(name), label=label)
    axes[2].set(title="alignment, confidence, probes", xlabel="step", ylim=(0, 1))
    axes[2].legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def make_views(feed: Feed, step: int) -> SampleViews:
    """Make views of a step's first unlabeled images: image, weak view, and strong views with captions.

    If the method uses no unlabeled images, take labeled images and their strong view.

    Args:
        feed: Feed of the run, with all probes that the step's plan depends on.
        step: The step whose plan is used.
    """
    spec, config, data = feed.spec, feed.config, feed.data
    shown_rows = data.unlabeled_indices if spec.unlabeled_images else feed.split
    plan = make_plan(spec, config.seed, step, feed.policy.weights_for(step))
    weak = list(spec.anchor_blocks[:1])
    shown = min(GRID_ROWS, spec.batch)
    blocks = weak + (list(spec.strong_blocks[:: spec.mu]) or [0])[:GRID_STRONG]  # of the first B images
    rows = (np.array(blocks)[:, None] * spec.batch + np.arange(shown)).reshape(-1)
    chosen = plan.views.select(rows)
    pipeline = feed.make_views(len(rows), torch.device("cpu"))
    try:
        pipeline.submit(pipeline.prepare(chosen))
        views = pipeline.collect().numpy().reshape(len(blocks), shown, *data.sides, 3)
    finally:
        pipeline.close()
    images = data.train_images[shown_rows[chosen.image[:shown]]]
    captions = [
        ["image"]
        + [
            "weak" if block in weak else describe(chosen.ops[number], chosen.levels[number])
            for block, number in zip(blocks, range(row, len(rows), shown), strict=True)
        ]
        for row in range(shown)
    ]
    return SampleViews(np.concatenate([images[:, None], views.swapaxes(0, 1)], axis=1), captions)


def draw_views(views: SampleViews, path: Path) -> None:
    """Draw views with their captions, one row per image.

    Args:
        views: The result of `make_views`.
        path: The PNG file.
    """
    shown, columns = views.images.shape[:2]
    # Fixed positions: an automatic layout takes seconds for this many axes.
    places = dict(left=0.01, right=0.99, bottom=0.01, top=1 - 0.3 / (2.15 * shown), wspace=0.1, hspace=0.3)
    figure, axes = plt.subplots(shown, columns, figsize=(1.9 * columns, 2.15 * shown), gridspec_kw=places)
    for number, axis in enumerate(np.asarray(axes).flat):
        row, column = divmod(number, columns)
        axis.set_axis_off()
        axis.imshow(views.images[row, column])
        caption = views.captions[row][column] if row == 0 or column else ""
        axis.set_title(caption.replace(", ", "\n"), fontsize=7 if column else 8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)

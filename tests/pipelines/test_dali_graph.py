"""The graph of DALI's own operators: its pixels on a CPU, and its definition for a GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from google.protobuf import empty_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines import ctaugment
from pipelines.dali import DaliViews
from pipelines.dali_graph import DaliGraphViews, arguments, view_graph
from pipelines.plan import PlanSpec, ViewPlan, make_plan
from pipelines.reference_ctaugment import FILTERS, pil_views, weak
from pipelines.views import plain_views
from tests.pages import ROOT
from tests.pipelines.test_transformations import compared
from tests.pipelines.test_views import photos

NAMES = ctaugment.NAMES
DIFFERENT = ("equalize", "rescale")
SIDES = (32, 96, 224)
PHOTOS = photos(60, 32, 32, 1)


def made_by(views: ViewPlan, images: np.ndarray, max_shift: int, kind=DaliGraphViews, **options) -> np.ndarray:
    """Make the views of one plan whose views are all of labeled images."""
    every = np.arange(len(images))
    options = options or ({"device": "cpu"} if kind is DaliGraphViews else {})
    pipeline = kind(images, every, every, len(views.image), max_shift, **options)
    pipeline.submit(pipeline.prepare(views))
    made = pipeline.collect().numpy()
    pipeline.close()
    return made


@pytest.mark.parametrize("height, width", [(16, 16), (32, 32), (20, 31)])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERENT])
def test_transformations_equal_pil(name, height, width):
    difference = compared(height, width, kind=DaliGraphViews).difference(name)
    assert difference.size and difference.max() == 0


@pytest.mark.parametrize("side", [224, 256])
def test_rotations_of_large_images_differ_from_pil_in_few_pixels(side):
    """DALI's warp adds float32 positions along each row, which are exact up to 128 pixels."""
    rng, count = np.random.default_rng(side), 16
    images = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    views = replace(plain_views(count), image=np.arange(count) % 2)
    views.ops[:, 0] = NAMES.index("rotate")
    views.levels[:, 0, 0] = rng.random(count, dtype=np.float32)
    made = made_by(views, images, 0)
    differs = (made != pil_views(images[views.image], views)).any(axis=-1)
    print(differs.sum(axis=(1, 2)), differs.mean())
    assert 0 < differs.mean() < 5e-5


def test_equalize_and_rescale_are_near_pil():
    everything = compared(32, 32, kind=DaliGraphViews)
    chosen = (6 * everything.level[:, 1]).astype(int)
    for index in range(6):
        views = (everything.names == "rescale") & (chosen == index)
        difference = np.abs(everything.made[views].astype(int) - everything.expected[views])
        at_rest = everything.level[views, 0] == 0
        assert difference[at_rest].max() == 0, "level 0 is the image"
        assert difference.max() <= {0: 0, 1: 0, 2: 1}.get(index, 255)
        assert difference.mean() < 5
    assert everything.difference("equalize").mean() < 12


def test_weak_views_equal_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    views = replace(
        plain_views(64),
        image=rng.integers(0, 5, 64),
        shift=rng.integers(-8, 9, (64, 2)).astype(np.int32),
        flip=rng.integers(0, 2, 64).astype(np.int32),
    )
    made = made_by(views, images, 8)
    for view, image in enumerate(views.image):
        np.testing.assert_array_equal(made[view], weak(images[image], views.shift[view], views.flip[view]))
    still = replace(views, shift=np.zeros_like(views.shift))
    np.testing.assert_array_equal(made_by(still, images, 0), made_by(still, images, 8))


@pytest.fixture(scope="module")
def plans() -> list[ViewPlan]:
    spec = PlanSpec(batch=8, k=4, labeled_images=60, unlabeled_images=60, max_shift=4, flip=True)
    return [make_plan(spec, 7, step, ctaugment.initial_weights()).views for step in range(5)]


def test_both_stages_equal_the_other_dali_pipeline(plans):
    for views in plans[:2]:
        theirs, ours = (made_by(views, PHOTOS, 4, kind) for kind in (DaliViews, DaliGraphViews))
        exact = ~np.isin(views.ops, [NAMES.index(name) for name in DIFFERENT]).any(axis=1)
        assert 0.5 < exact.mean() < 1
        np.testing.assert_array_equal(ours[exact], theirs[exact])


def test_a_view_does_not_depend_on_the_rest_of_the_batch(plans):
    """Ranks make views of their partners, which must equal those of the partners' ranks."""
    some = np.random.default_rng(0).permutation(len(plans[0].image))[:7]
    np.testing.assert_array_equal(made_by(plans[0].select(some), PHOTOS, 4), made_by(plans[0], PHOTOS, 4)[some])


def test_batches_are_in_order_and_own_their_memory(plans):
    alone = [made_by(views, PHOTOS, 4) for views in plans]
    every = np.arange(60)
    for options in ({"prefetch": 1}, {"prefetch": 3, "threads": 2, "resident": False}):
        pipeline = DaliGraphViews(PHOTOS, every, every, len(plans[0].image), 4, "cpu", **options)
        kept, prefetch = [], options["prefetch"]
        for step, views in enumerate(plans):
            if step >= prefetch:
                kept.append(pipeline.collect())
            pipeline.submit(pipeline.prepare(views))
        kept += [pipeline.collect() for _ in range(prefetch)]
        pipeline.close()
        for batch, expected in zip(kept, alone, strict=True):
            np.testing.assert_array_equal(batch.numpy(), expected)


# Definition for a GPU


def fields(message: bytes) -> list:
    """Parse a serialized protobuf message without its schema."""
    parsed = empty_pb2.Empty()
    parsed.ParseFromString(message)
    return list(UnknownFieldSet(parsed))


def operators(device: str) -> list[tuple[str, set[str], dict[str, tuple[str, bool]]]]:
    """Operators of the serialized graph: name, devices of its outputs, inputs by name as (device, is an argument).

    In DALI's format, field 5 of a pipeline is an operator; its fields 1, 2 and 3 are its name, inputs and outputs.
    """
    graph = view_graph(device, 32, 32, 4, batch_size=8, num_threads=1, device_id=None, exec_dynamic=True)
    found = []
    for operator in (fields(each.data) for each in fields(graph.serialize()) if each.field_number == 5):
        texts = {number: [each.data for each in operator if each.field_number == number] for number in (1, 2, 3)}
        inputs, outputs = (
            [{each.field_number: each.data for each in fields(text)} for text in texts[number]] for number in (2, 3)
        )
        found.append((
            texts[1][0].decode(),
            {each[2].decode() for each in outputs},
            {each[1].decode(): (each[2].decode(), bool(each[3])) for each in inputs},
        ))  # fmt: skip
    return found


def test_the_gpu_graph_has_the_same_operators_on_the_gpu():
    on_cpu, on_gpu = operators("cpu"), operators("gpu")
    assert [name for name, *_ in on_gpu] == [name for name, *_ in on_cpu]
    assert {device for _, devices, _ in on_cpu for device in devices} == {"cpu"}
    names = {name for name, *_ in on_gpu}
    assert not [name for name in names if "python" in name.lower()]
    assert {"Slice", "Flip", "Cat", "WarpAffine", "Filter", "Equalize", "Erase", "Resize"} <= names
    for name, devices, inputs in on_gpu:
        if name == "ExternalSource" or (name, devices) == ("Reinterpret", {"cpu"}):
            continue
        assert devices == {"gpu"}, name
        for source, (device, is_argument) in inputs.items():
            assert device == ("cpu" if is_argument else "gpu"), (name, source)


def test_the_gpu_graph_reads_host_arguments_on_the_host():
    sources = {}
    for name, devices, inputs in operators("gpu"):
        if name == "ExternalSource":
            assert not inputs
            sources.setdefault(*devices, 0)
            sources[next(iter(devices))] += 1
    on_host, operands = arguments(plain_views(8), 32, 32, 4)
    assert sources == {"cpu": len(on_host), "gpu": len(operands) + 1}  # and the images


def test_counts_of_the_documentation():
    text = (ROOT / "docs/views.md").read_text(encoding="utf-8")
    counts = Counter(name for name, devices, _ in operators("gpu") if devices == {"gpu"})
    said = re.search(r"(\d+) operators on the GPU, (\d+) of them\s+arithmetic", text)
    elementwise = counts["_ArithmeticGenericOp"] + counts["Cast"]
    assert said and (int(said[1]), int(said[2])) == (sum(counts.values()), elementwise)


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_make_the_same_views(plans):
    for resident in (True, False):
        on_gpu = DaliGraphViews(PHOTOS, np.arange(60), np.arange(60), len(plans[0].image), 4, resident=resident)
        for views in plans:
            on_gpu.submit(on_gpu.prepare(views))
            made = on_gpu.collect().cpu().numpy().astype(int)
            difference = np.abs(made - made_by(views, PHOTOS, 4))
            assert (difference > 0).mean() < 0.01 and np.median(difference) == 0
        on_gpu.close()


# The table of docs/views.md


def real_pictures(side: int) -> np.ndarray:
    """Cut eight squares out of two photographs: (8, side, side, 3) uint8."""
    cut = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo).resize((4 * side, 2 * side), Image.Resampling.LANCZOS)
        cut += [np.asarray(image.crop((x, side // 2, x + side, side // 2 + side))) for x in range(0, 4 * side, side)]
    return np.stack(cut)


def measured(side: int) -> dict[str, tuple[float, float, int]]:
    """Compare the graph with PIL on photographs: share of values that differ in percent, mean and largest difference.

    Keys are the transformations that differ, rescale once for each filter.
    """
    images, levels = real_pictures(side), np.linspace(0.05, 0.95, 4)
    cases = [("equalize", 0.0)] + [("rescale", (index + 0.5) / len(FILTERS)) for index in range(len(FILTERS))]
    keys = ["equalize", *(f"rescale, {each.name}" for each in FILTERS)]
    count = len(images) * len(levels)
    views = plain_views(count * len(cases))
    ops, parameters = views.ops.copy(), views.levels.copy()
    for number, (name, second) in enumerate(cases):
        own = slice(number * count, (number + 1) * count)
        ops[own, 0] = NAMES.index(name)
        parameters[own, 0, 0], parameters[own, 0, 1] = np.repeat(levels, len(images)), second
    views = replace(views, image=np.tile(np.arange(len(images)), len(levels) * len(cases)), ops=ops, levels=parameters)
    made = made_by(views, images, 0).astype(int)
    difference = np.abs(made - pil_views(images[views.image], views))
    parts = difference.reshape(len(cases), -1)
    return {
        key: (100 * float((part > 0).mean()), float(part.mean()), int(part.max()))
        for key, part in zip(keys, parts, strict=True)
    }


@pytest.mark.parametrize("side", SIDES)
def test_the_table_of_differences(side):
    text = (ROOT / "docs/views.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (equalize|rescale, \w+) \|(.+)\|(.+)\|(.+)\|$", text, re.M)}
    found = measured(side)
    assert rows.keys() == found.keys()
    for key, (share, mean, largest) in found.items():
        said_share, said_mean, said_largest = map(float, re.findall(r"[\d.]+", rows[key][SIDES.index(side)]))
        assert said_share == pytest.approx(share, rel=0.05, abs=0.1), key
        assert said_mean == pytest.approx(mean, rel=0.05, abs=0.01), key
        assert abs(said_largest - largest) <= 2, key


if __name__ == "__main__":  # Prints the table's rows.
    tables = {side: measured(side) for side in SIDES}
    for key in tables[SIDES[0]]:
        cells = ["{:.1f} %, {:.2f}, {}".format(*tables[side][key]) for side in SIDES]
        print(f"| {key} | {' | '.join(cells)} |")

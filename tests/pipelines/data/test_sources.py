"""The paper's data sets, converted from small archives in the original formats, and the real Fashion-MNIST."""

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets as tv

from pipelines.data import sources
from pipelines.data.cache import DataError
from pipelines.data.datasets import DATASETS, PREPARED


def sample_image(number, side, channels=3):
    """Return (side, side, channels) uint8 whose pixels depend on image number, row, column and channel."""
    y, x, c = np.mgrid[:side, :side, :channels]
    return ((31 * number + 7 * y + 3 * x + 101 * c) % 251).astype(np.uint8)


def sample_images(first, count, side):
    return np.stack([sample_image(number, side) for number in range(first, first + count)])


def md5(content):
    return hashlib.md5(content).hexdigest()


def tar(path, files):
    """Write a .tar.gz of files by name and return its MD5."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return md5(path.read_bytes())


def cifar(folder, monkeypatch, kind, batches, meta, label):
    """Write CIFAR's archive: pickled batches with images stored by channel."""
    files, number = {}, 0
    for name, count in batches.items():
        images = np.stack([sample_image(n, 32).transpose(2, 0, 1).reshape(-1) for n in range(number, number + count)])
        files[name] = pickle.dumps({"data": images, label: [n % 10 for n in range(number, number + count)]})
        number += count
    files[meta] = pickle.dumps({kind.meta["key"]: [f"name {c}" for c in range(10)]})
    base = {f"{kind.base_folder}/{name}": content for name, content in files.items()}
    monkeypatch.setattr(kind, "tgz_md5", tar(folder / kind.filename, base))
    names = list(batches)
    monkeypatch.setattr(kind, "train_list", [[name, md5(files[name])] for name in names[:-1]])
    monkeypatch.setattr(kind, "test_list", [[names[-1], md5(files[names[-1]])]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(files[meta])})


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    return folder


def test_cifar_10_keeps_the_order_of_its_batches(archives, data_dir, monkeypatch):
    batches = {f"data_batch_{n}": 3 for n in range(1, 6)} | {"test_batch": 4}
    cifar(archives, monkeypatch, tv.CIFAR10, batches, "batches.meta", "labels")
    seen = []
    sources.prepare("cifar10", archives, download=False, progress=lambda *words: seen.append(words))
    data = DATASETS["cifar10"]()
    np.testing.assert_array_equal(data.train_images, sample_images(0, 15, 32))
    np.testing.assert_array_equal(data.test_images, sample_images(15, 4, 32))
    assert data.train_labels.tolist() == [n % 10 for n in range(15)] and data.test_labels.tolist() == [5, 6, 7, 8]
    assert data.classes[3] == "name 3" and len(data.classes) == 10 and data.class_order == ()
    assert seen[-1] == ("converting", 19, 19)


def test_cifar_100_has_fine_labels(archives, data_dir, monkeypatch):
    monkeypatch.setattr(tv.CIFAR100, "tgz_md5", "")
    cifar(archives, monkeypatch, tv.CIFAR100, {"train": 6, "test": 2}, "meta", "fine_labels")
    sources.prepare("cifar100", archives, download=False)
    data = DATASETS["cifar100"]()
    assert data.train_labels.tolist() == list(range(6)) and data.test_images.shape == (2, 32, 32, 3)


def matlab(folder, monkeypatch, counts):
    """Write SVHN's files: the last dimension counts images, and digit 0 is stored as 10."""
    entries, number = dict(tv.SVHN.split_list), 0
    for split, count in counts.items():
        path = folder / f"{split}_32x32.mat"
        images = sample_images(number, count, 32).transpose(1, 2, 3, 0)
        labels = np.array([(n % 10) or 10 for n in range(number, number + count)], np.uint8)[:, None]
        savemat(path, {"X": images, "y": labels})
        entries[split] = [entries[split][0], path.name, md5(path.read_bytes())]
        number += count
    monkeypatch.setattr(tv.SVHN, "split_list", entries)


def test_svhn_with_and_without_its_extra_images(archives, data_dir, monkeypatch):
    matlab(archives, monkeypatch, {"train": 12, "test": 3, "extra": 5})
    sources.prepare("svhn", archives, download=False)
    sources.prepare("svhn-extra", archives, download=False)
    data, extra = DATASETS["svhn"](), DATASETS["svhn-extra"]()
    np.testing.assert_array_equal(data.train_images, sample_images(0, 12, 32))
    np.testing.assert_array_equal(data.test_images, sample_images(12, 3, 32))
    assert data.train_labels.tolist() == [n % 10 for n in range(12)], "digit 0 is class 0"
    assert data.class_order == extra.class_order == (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)
    np.testing.assert_array_equal(extra.train_images[12:], sample_images(15, 5, 32))
    assert extra.train_labels.tolist() == [n % 10 for n in (*range(12), *range(15, 20))]


def test_stl_10_has_labeled_images_first_and_published_folds(archives, data_dir, monkeypatch):
    kind = tv.STL10

    def stored(first, count):
        """Return images as stored: by channel and column."""
        return sample_images(first, count, 96).transpose(0, 3, 2, 1).tobytes()

    names = [f"bird{c}" for c in range(10)]
    files = {
        "train_X.bin": stored(0, 6), "train_y.bin": bytes([1, 2, 10, 1, 2, 3]), "unlabeled_X.bin": stored(6, 3),
        "test_X.bin": stored(9, 2), "test_y.bin": bytes([10, 1]), "class_names.txt": "\n".join(names).encode() + b"\n",
        "fold_indices.txt": b"5 0 2 \n1 3 4 \n",
    }  # fmt: skip
    digest = tar(archives / kind.filename, {f"{kind.base_folder}/{name}": content for name, content in files.items()})
    monkeypatch.setattr(kind, "tgz_md5", digest)
    listed = [[name, md5(files[name])] for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")]
    monkeypatch.setattr(kind, "train_list", listed)
    monkeypatch.setattr(kind, "test_list", [[name, md5(files[name])] for name in ("test_X.bin", "test_y.bin")])
    sources.prepare("stl10", archives, download=False)
    data = DATASETS["stl10"]()
    np.testing.assert_array_equal(data.train_images, sample_images(0, 9, 96))
    np.testing.assert_array_equal(data.test_images, sample_images(9, 2, 96))
    assert data.train_labels.tolist() == [0, 1, 9, 0, 1, 2, -1, -1, -1] and data.test_labels.tolist() == [9, 0]
    assert [fold.tolist() for fold in data.folds] == [[5, 0, 2], [1, 3, 4]] and data.classes == tuple(names)


def idx(values):
    """Return an array in MNIST's format, compressed."""
    return gzip.compress(struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes())


def fashion(folder, monkeypatch):
    resources = []
    for name, count in (("train", 5), ("t10k", 3)):
        gray = np.stack([sample_image(n, 28, 1)[..., 0] for n in range(count)])
        labels = np.arange(count).astype(np.uint8)
        for kind, values in (("images-idx3", gray), ("labels-idx1", labels)):
            path = folder / f"{name}-{kind}-ubyte.gz"
            path.write_bytes(idx(values))
            resources.append((path.name, md5(path.read_bytes())))
    monkeypatch.setattr(tv.FashionMNIST, "resources", resources)
    monkeypatch.setattr(sources, "_DEBIAN", folder / "no such folder")


def test_fashion_mnist_is_padded_and_its_channel_repeated(archives, data_dir, monkeypatch):
    fashion(archives, monkeypatch)
    sources.prepare("fashion-mnist", archives, download=False)
    data = DATASETS["fashion-mnist"]()
    assert data.train_images.shape == (5, 32, 32, 3) and data.test_images.shape == (3, 32, 32, 3)
    for image, number in zip(data.train_images, range(5), strict=True):
        for channel in range(3):
            np.testing.assert_array_equal(image[2:30, 2:30, channel], sample_image(number, 28, 1)[..., 0])
        assert not image[:2].any() and not image[30:].any() and not image[:, :2].any() and not image[:, 30:].any()
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and data.classes[9] == "Ankle boot"


def test_fashion_mnist_16_averages_four_pixels(archives, data_dir, monkeypatch):
    fashion(archives, monkeypatch)
    sources.prepare("fashion-mnist-16", archives, download=False)
    (image, *_), source = DATASETS["fashion-mnist-16"]().train_images, sample_image(0, 28, 1)[..., 0].astype(int)
    assert image.shape == (16, 16, 3) and not image[0].any() and not image[:, 15].any()
    four = source[4:6, 6:8].sum() / 4
    assert abs(int(image[1 + 2, 1 + 3, 0]) - four) <= 0.5


@pytest.mark.skipif(not sources._DEBIAN.exists(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist")
def test_real_fashion_mnist(data_dir):
    sources.prepare("fashion-mnist", download=False)
    data = DATASETS["fashion-mnist"]()
    assert data.train_images.shape == (60_000, 32, 32, 3) and data.test_images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10 == (6 * np.bincount(data.test_labels)).tolist()


def test_missing_files_are_named_with_url_and_checksum(archives, data_dir):
    with pytest.raises(
        DataError,
        match=r"cifar-10-python.tar.gz is missing; download .*/cifar-10-python.tar.gz \(MD5 c58f30108f718f92721a",
    ) as e:
        sources.prepare("cifar10", archives, download=False)
    assert "\n" not in str(e.value) and str(data_dir / "downloads" / "cifar10") in str(e.value)


def test_without_a_network_the_message_says_what_to_download(archives, data_dir, monkeypatch):
    import torchvision.datasets.utils as utils

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", unreachable)
    with pytest.raises(
        DataError,
        match=r"train_32x32.mat cannot be downloaded automatically; download .*train_32x32.mat \(MD5 .*\) to",
    ):
        sources.prepare("svhn")
    assert not (data_dir / "svhn").exists()


def test_a_full_disk_during_a_download_raises(data_dir, monkeypatch):
    import torchvision.datasets.utils as utils

    def full(*arguments):
        Path(arguments[1], arguments[2]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "download_url", full)
    with pytest.raises(DataError, match=r"svhn cannot be written \(No space left on device\)"):
        sources.prepare("svhn")
    assert not list((data_dir / "downloads" / "svhn").iterdir())


@pytest.mark.parametrize("download", [True, False])
def test_an_interrupted_download_or_copy_is_repeated(archives, data_dir, monkeypatch, download):
    import torchvision.datasets.utils as utils

    matlab(archives, monkeypatch, {"train": 3, "test": 3})

    def interrupted(*arguments):
        place = Path(arguments[1], arguments[2]) if download else Path(arguments[1])
        place.write_bytes((archives / "train_32x32.mat").read_bytes()[:100])
        raise KeyboardInterrupt

    def fetched(url, folder, name, md5):
        Path(folder, name).write_bytes((archives / url.rpartition("/")[2]).read_bytes())

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(*((utils, "download_url") if download else (shutil, "copyfile")), interrupted)
        sources.prepare("svhn", None if download else archives)
    monkeypatch.setattr(utils, "download_url", fetched)
    sources.prepare("svhn", None if download else archives)
    assert len(DATASETS["svhn"]().train_images) == 3
    raw = data_dir / "downloads" / "svhn"
    assert sorted(path.name for path in raw.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_damaged_files_raise(archives, data_dir, monkeypatch):
    matlab(archives, monkeypatch, {"train": 3, "test": 3})
    path = archives / "test_32x32.mat"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    for place in (archives, data_dir / "downloads" / "svhn"):
        with pytest.raises(DataError, match=rf"^{place}/test_32x32.mat is damaged \(MD5 \w+, expected \w+\);"):
            sources.prepare("svhn", archives, download=False)
        shutil.copy(path, data_dir / "downloads" / "svhn")
    # The right checksum, but not the expected format.
    path.write_bytes(b"no matrices")
    entries = tv.SVHN.split_list | {"test": [*tv.SVHN.split_list["test"][:2], md5(b"no matrices")]}
    monkeypatch.setattr(tv.SVHN, "split_list", entries)
    (data_dir / "downloads" / "svhn" / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"the files of svhn in .* cannot be read"):
        sources.prepare("svhn", archives, download=False)
    with pytest.raises(DataError, match="no prepared data"):
        DATASETS["svhn"]()


def test_every_prepared_set_has_a_source():
    assert set(PREPARED) == set(sources.SOURCES)
    for name in PREPARED:
        for file in sources.files(name):
            assert len(file.md5) == 32 and file.urls

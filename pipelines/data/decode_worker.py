"""Process that decodes image files for `pipelines.data.decode`: DALI for plain JPEGs, PIL for the rest.

The process answers requests until the other side closes the connection, or ends. For each file of a request, in order,
it sends the image or the reason why there is none, and a remark.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipelines.data import pixels
from pipelines.data.jpegs import BATCH, Jpeg, JpegDecoder, plain_jpeg

MEMORY = 1 << 27  # Bytes of files and decoded pixels that a batch may need per thread, for four threads at least.
_PIL_BYTES = 8  # Per pixel, for an image and its copy in another mode.

Result = tuple[np.ndarray | str, str]


@dataclass(frozen=True)
class _File:
    """File that has been read.

    Attributes:
        content: The file, or the reason why it cannot be read.
        jpeg: The file for DALI; None for PIL.
        memory: Estimate of the bytes needed to decode it.
    """

    content: bytes | str
    jpeg: Jpeg | None
    memory: int


@dataclass(frozen=True)
class Request:
    """Files to decode.

    Attributes:
        files: Their paths.
        size: Side of the images in pixels.
        threads: Number of threads.
        device: "cpu" or "gpu".
        one_by_one: Have no other file in work than the one whose result is sent next.
        only_pil: Decode all files with PIL.
    """

    files: Sequence[Path]
    size: int
    threads: int
    device: str
    one_by_one: bool = False
    only_pil: bool = False


def main() -> None:
    """Answer the requests that arrive at the socket whose descriptor is the only argument."""
    connection = Connection(int(sys.argv[1]))
    make_decoder = functools.lru_cache(1)(JpegDecoder)  # The same for all requests of a preparation.
    try:
        connection.send("ready")
        while True:
            request = connection.recv()
            try:
                for result in results(request, make_decoder(request.size, request.threads, request.device)):
                    connection.send(result)
            except BrokenPipeError:
                raise
            except Exception as error:
                connection.send(error)
    except (EOFError, OSError):  # The other side has ended, or needs no more.
        return


def results(request: Request, jpegs: JpegDecoder) -> Iterator[Result]:
    """Yield an image, (size, size, 3) uint8, or the reason why there is none, and a remark for each file."""
    size, one_by_one = request.size, request.one_by_one
    with ThreadPoolExecutor(request.threads) as pool, ThreadPoolExecutor(1) as reader:
        files = (_read(path, request.only_pil) for path in request.files)
        memory = MEMORY * max(request.threads, 4)
        batches = _batches(files, size, 1 if one_by_one else BATCH, memory)
        ahead = reader.submit(next, batches, None)
        while batch := ahead.result():
            if not one_by_one:
                ahead = reader.submit(next, batches, None)
            quick = [place for place, file in enumerate(batch) if file.jpeg]
            images = jpegs([file.jpeg for file in batch if file.jpeg])
            made: dict[int, Result] = {
                place: (image, "") for place, image in zip(quick, images, strict=True) if image is not None
            }
            slow = [place for place in range(len(batch)) if place not in made]
            made |= zip(slow, pool.map(lambda place, files=batch: _by_pil(files[place], size), slow), strict=True)
            for place in range(len(batch)):
                yield made[place]
            if one_by_one:
                ahead = reader.submit(next, batches, None)


def _read(path: Path, only_pil: bool) -> _File:
    try:
        content = pixels.content(path)
    except pixels.DecodeError as error:
        return _File(str(error), None, 0)
    except OSError as error:
        return _File(error.strerror or type(error).__name__, None, 0)
    if jpeg := None if only_pil else plain_jpeg(content):
        return _File(content, jpeg, len(content) + 3 * jpeg.width * jpeg.height)
    width, height = pixels.dimensions(content)
    return _File(content, None, len(content) + _PIL_BYTES * width * height)


def _batches(files: Iterator[_File], size: int, most: int, memory: int) -> Iterator[list[_File]]:
    """Yield batches of at least one and at most `most` files that need at most `memory` bytes together."""
    batch: list[_File] = []
    used = 0
    for file in files:
        needed = file.memory + 3 * size * size
        if batch and (len(batch) == most or used + needed > memory):
            yield batch
            batch, used = [], 0
        batch.append(file)
        used += needed
    if batch:
        yield batch


def _by_pil(file: _File, size: int) -> Result:
    if isinstance(file.content, str):
        return file.content, ""
    try:
        image, remark = pixels.rgb(file.content)
        return pixels.resized(image, size), remark
    except pixels.DecodeError as error:
        return str(error), ""


if __name__ == "__main__":
    main()

"""Decoding of image files to uint8 images of one size, on all cores: DALI for plain JPEGs, PIL for the rest.

Every image is rotated according to its EXIF data, resized so that its shorter side has the requested size, and
center-cropped. Sizes, positions and orientations come from the same code for DALI and for PIL, and both decode JPEGs to
the same values on a CPU. `predict` uses PIL for all files. Its images equal the prepared ones exactly, except for JPEGs
that DALI resized: on photographs, these differ by at most 8 of 255 gray levels, 13 within three pixels of the border,
and 0.5 on average, since DALI repeats pixels at the border and PIL rounds twice. Black and white neighbors differ by up
to 30 in images that keep about their size or grow. On a GPU, DALI uses the hardware decoder if there is one, whose
values may differ by a few gray levels more.

PIL handles what DALI does not: the first frame of GIFs, palettes, transparency (composited on black), more than 8 bits
per channel (stretched to 8), CMYK, and files with a misleading suffix.

Decoding takes place in a separate process, which a damaged file may end. The files in work are then decoded one by one.
A file that ends the process again is decoded by PIL, and reported as unreadable if that fails too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipelines.data.decode_worker import Request, Result
from pipelines.data.jpegs import BATCH
from pipelines.processes import python_environment

_WORKER = "pipelines.data.decode_worker"


def decode(
    files: Sequence[Path],
    size: int,
    threads: int = 0,
    device: str = "cpu",
    note: Callable[[int, str], None] = lambda index, remark: None,
    process: DecodingProcess | None = None,
) -> Iterator[tuple[int, np.ndarray | str]]:
    """Decode files in order.

    Args:
        files: Image files in formats that PIL supports.
        size: Side of the images in pixels.
        threads: Number of threads; 0 for one per core.
        device: "cpu", or "gpu" to decode and resize JPEGs on the first GPU.
        note: Called with an index and a remark before an image is yielded that was not decoded as usual, see
            `pipelines.data.pixels.rgb`.
        process: Process that decodes; None for a new one.

    Yields:
        Index of each file, and its image, (size, size, 3) uint8, or the reason why it cannot be read.

    Raises:
        RuntimeError: The decoding process does not start.
    """
    request = Request((), size, threads or len(os.sched_getaffinity(0)), device)
    done = suspects = 0  # Files before `suspects` are decoded one by one.
    context: AbstractContextManager[DecodingProcess] = nullcontext(process) if process else DecodingProcess()
    with context as worker:
        while done < len(files):
            careful = done < suspects
            part = files[done:suspects] if careful else files[done:]
            try:
                for image, remark in worker.results(replace(request, files=part, one_by_one=careful)):
                    if remark:
                        note(done, remark)
                    yield done, image
                    done += 1
            except _Died as death:
                if not careful:
                    suspects = min(done + BATCH, len(files))
                    continue
                try:
                    ((image, remark),) = worker.results(replace(request, files=files[done : done + 1], only_pil=True))
                except _Died:
                    image, remark = f"decoding it ended the process ({death})", ""
                else:
                    remark = remark or f"decoded by PIL, since DALI's decoder ended the process: {death}"
                if not isinstance(image, str):
                    note(done, remark)
                yield done, image
                done += 1


class _Died(Exception):
    """The decoding process ended before its files were done. The message says how."""


class DecodingProcess:
    """Process that decodes files, started when it is needed and again after it has died. A context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> DecodingProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def results(self, request: Request) -> Iterator[Result]:
        """Yield an image or the reason why there is none, and a remark for each file.

        Raises:
            RuntimeError: The process does not start.
            _Died: It ended before all files were done.
        """
        complete = False
        try:
            connection = self._connection or self._start()
            connection.send(request)
            for _ in request.files:
                received = connection.recv()
                if isinstance(received, Exception):
                    raise received
                yield received
            complete = True
        except (EOFError, OSError):
            raise _Died(self._end(wait=10)) from None
        finally:
            if not complete:
                self._end()

    def _start(self) -> Connection:
        self._connection, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", _WORKER, str(other.fileno())],
                env=python_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                process_group=0,  # Not interrupted from the terminal: this process ends it.
            )
        try:
            self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process that decodes images does not start ({self._end(wait=10)})") from None
        return self._connection

    def _end(self, wait: float = 0) -> str:
        """End the process unless it ends by itself within some seconds. Return how it ended."""
        if self._process is None or self._connection is None:
            return ""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait)
        self._process.kill()
        code = self._process.wait()
        self._process = self._connection = None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

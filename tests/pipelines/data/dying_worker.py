"""Decoding process for tests: dies at images of certain colors, as a library does at a damaged file."""

import os
import signal
from io import BytesIO

from PIL import Image

from pipelines.data import decode_worker, pixels
from pipelines.data.jpegs import JpegDecoder


def color(content):
    """Return the channel that is 200 at least 180 above the others, or None."""
    with Image.open(BytesIO(content)) as image:
        corner = image.convert("RGB").getpixel((1, 1))
    return next((n for n in range(3) if corner[n] - max(corner[:n] + corner[n + 1 :]) > 150), None)


class DyingDecoder(JpegDecoder):
    """Killed by green images, ended by a segmentation fault at blue ones, and by an exit at red ones."""

    def __call__(self, files):
        """Decode the files unless one of them has a color to die at."""
        for file in files:
            match color(file.content):
                case 0:
                    os._exit(3)
                case 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                case 2:
                    os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(files)


def dying_rgb(content, decode=pixels.rgb):
    """Decode with PIL, but not blue images."""
    if color(content) == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(content)


decode_worker.JpegDecoder = DyingDecoder
pixels.rgb = dying_rgb

if __name__ == "__main__":
    decode_worker.main()

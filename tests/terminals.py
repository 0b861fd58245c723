"""Run a script on a terminal of a given width."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_terminal(script, width=80, **environment):
    """Run a Python script whose stdout and stderr are a terminal, and return what it prints to it.

    Args:
        script: The source code.
        width: Columns of the terminal.
        environment: Changes of the environment variables.
    """
    names = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    variables = plain | {"TERM": "xterm"} | environment
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=follower, env=variables)
    os.close(follower)
    printed = b""
    try:
        while content := os.read(leader, 4096):
            printed += content
    except OSError:  # The other end is closed.
        pass
    finally:
        os.close(leader)
    assert process.wait(60) == 0, printed.decode()
    return printed.decode()

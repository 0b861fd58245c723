"""One thread a process: those of two at once would wait for one another's cores, and bits depend on threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, here and in every process that a test starts

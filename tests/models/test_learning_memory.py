"""A process that learns keeps its memory: measured by the pages that the system has to clear for it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from headrace.models.learning.memory import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23, np.uint8), np.ones(2**23, np.uint8)
before = faults()
for _ in range(50):
    np.ones(2**23, np.uint8)
print(faults() - before)
"""


def _faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=120)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="MEMORY: only glibc's allocator can be told to keep memory")
def test_what_is_freed_is_not_cleared_again():
    given_back, kept = _faults("given back"), _faults("kept")
    assert kept < 0.1 * given_back, (kept, given_back)

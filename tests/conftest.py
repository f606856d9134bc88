import os
from pathlib import Path

import pytest

# As the command line does: OpenMP's waiting threads sleep, so that tests beside busy processes don't crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core; must be said before PyTorch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
REAL_TIME = tuple(HERE / each for each in ("emulation", "edge/test_edge_daemon.py", "server/test_server_daemon.py"))
"""Tests of real processes in real time."""
ALONE = (*REAL_TIME, HERE / "bench/test_bench_server.py")
"""Tests beside which no others are run: `make test` runs all others side by side, and these after them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A machine that stands still for a second fails what is in order where processes run in real time.

    So a test of those that fails is run again, up to twice, and the report says so (`R`, and a line `RERUN`); what is
    broken fails thrice.
    """
    for item in items:
        if any(item.path.is_relative_to(each) for each in REAL_TIME):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=5))
        if any(item.path.is_relative_to(each) for each in ALONE):
            item.add_marker(pytest.mark.alone)

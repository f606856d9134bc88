"""Processes learn together, as `torchrun` starts them."""

import os
import subprocess
import sys

TEAM = """
import pathlib, sys, torch
from headrace.models.learning.team import Team
with Team.joined("cpu") as team:
    p = torch.nn.Parameter(torch.zeros(3)); q = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.full((3,), float(team.rank + 1))
    if team.first:
        q.grad = torch.ones(2)
    team.average_gradients([p, q])
    b = torch.full((2,), float(team.rank)); n = torch.tensor(team.rank)
    team.average([b, n])
    assert team.size == 2 and p.grad.tolist() == [1.5] * 3 and q.grad.tolist() == [0.5] * 2, (p.grad, q.grad)
    assert b.tolist() == [0.5, 0.5] and int(n) == team.rank
    pathlib.Path(sys.argv[1], f"well-{team.rank}").touch()
"""


def test_two_processes_share_gradients(tmp_path):
    script = tmp_path / "team.py"
    script.write_text(TEAM)
    team = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*team, str(script), str(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.glob("well-*")) == ["well-0", "well-1"]

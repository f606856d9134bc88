"""`headrace bench control`: the control loop beside the offline optimum and its rivals, over recorded links.

`run.py` (what the command does) -> `cells.py` (one measured cell) -> `simulate.py` (the edge in virtual time).
"""

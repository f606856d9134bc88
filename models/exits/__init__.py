"""Local exits: answers from a head's features on the device, early, and knowing how sure they are.

`graph.py` is what runs, behind `classifier.py`'s last layer; `narrow.py` is a cheap stand-in for the rest of the
backbone, which `learn.py` teaches. `confidence.py` calibrates, `costs.py` times, `command.py` gives a bundle its exits
and measures them.
"""

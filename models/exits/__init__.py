"""Local exits: answers from a head's features on the device, early, and knowing how sure they are.

`graph.py` is what runs, `confidence.py` calibrates, `command.py` gives a bundle its exits and measures them.
"""

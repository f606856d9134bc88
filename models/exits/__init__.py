"""Local exits: the backbone on fewer pixels, so that a device can answer early, and knows how sure it is.

`graph.py` is what runs, `confidence.py` calibrates, `command.py` gives a bundle its exits and measures them.
"""

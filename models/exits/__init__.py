"""Local exits: a small classifier on a head's features, so that a device can answer early, and knows how sure it is.

`views.py` makes what it is learned from, `network.py` is what runs, `learn.py` trains, `confidence.py` calibrates.
"""

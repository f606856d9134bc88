"""Headrace: split computing for cameras. The head of a vision model runs on the device, the tail on a server."""

__version__ = "0.1.0"

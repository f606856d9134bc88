"""The device: frames, head and encoder, the control loop, the stream. Read `pipeline.py` first. Imports no torch."""

"""The server: the stream's other end, batches, decoder and tail. Read `pipeline.py` first."""

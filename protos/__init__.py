"""The wire: `headrace.proto`, its generated stubs, and `messages.py`, the only importer of message classes."""

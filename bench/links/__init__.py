"""Emulated links: recorded traces and rates, a link in virtual time, and real ones under unmodified processes.

`spec.py` describes a link; `emulators.py` finds what can emulate it here: netem, a TUN relay, or the TCP proxy.
"""

"""`make demo`: real video through a real edge and a real server over a link that narrows. `run.py` is read first."""

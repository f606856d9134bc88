import os

# As the command line does: OpenMP's waiting threads sleep, so that tests beside busy processes don't crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

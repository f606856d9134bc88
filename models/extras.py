"""What a device's installation leaves out, and how to get it: the extras in pyproject.toml by what they import."""

from __future__ import annotations

# An extra, and the modules that no smaller one has.
EXTRAS = {
    "server": (
        "torch", "torchvision", "timm", "onnx", "onnxscript", "scipy", "compressai", "faster_coco_eval",
        "grpc_reflection",
    ),
    "tracing": ("opentelemetry",),
    "ray": ("ray",),
    "bench": ("bjontegaard", "matplotlib", "skimage", "skvideo"),
    "bench-server": ("litserve",),
}  # fmt: skip


def how_to_install(*extras: str) -> str:
    """How to install these extras.

    >>> how_to_install("server", "bench")
    "run `pip install '.[server,bench]' -c constraints.txt` in Headrace's folder"
    """
    return f"run `pip install '.[{','.join(extras)}]' -c constraints.txt` in Headrace's folder"


def missing(error: ModuleNotFoundError) -> str:
    """One line for a module that an extra would have brought; "" for any other module, whose absence is a mistake of
    ours or of the installation."""
    module = (error.name or "").partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if module in modules), "")
    return f"{module} is not installed, which this command needs; {how_to_install(extra)}" if extra else ""

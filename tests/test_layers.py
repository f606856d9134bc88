"""Who may import whom: models < protos < edge, server < bench, cli; and the edge without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "protos": {"protos", "models"},
    "edge": {"edge", "models", "protos"},
    "server": {"server", "models", "protos"},
}
HEAVY = {"torch", "torchvision", "timm", "compressai", "onnx", "onnxscript", "matplotlib", "skimage", "skvideo"}


def imported(path: Path) -> set[str]:
    """Folders of ours, and packages of others, that a module imports at any depth of its code."""
    inside = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            within = ["headrace", *inside][: 2 + len(inside) - node.level]
            names = [".".join([*within, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "headrace" and len(parts) > 1 else parts[0])
    return found


def modules_of(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if "_pb2" not in p.name]


def test_imports_are_found_however_deep_a_module_lies():
    assert "edge" in imported(ROOT / "bench" / "control" / "cells.py")
    assert "models" in imported(ROOT / "bench" / "training_free" / "run.py")
    assert "protos" in imported(ROOT / "edge" / "stream.py")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_lies_below_them(folder):
    ours = {"models", "protos", "edge", "server", "bench", "cli"}
    modules = modules_of(folder)
    assert modules
    for path in modules:
        assert imported(path) & ours <= MAY_IMPORT[folder], path


def test_only_messages_imports_the_generated_classes():
    for folder in (*MAY_IMPORT, "bench"):
        for path in modules_of(folder):
            if path.name != "messages.py":
                assert "headrace_pb2" not in path.read_text(), path


def test_the_edge_runs_without_torch():
    """The command line, the daemon and all that it imports, in a process of its own."""
    code = (
        "import sys, headrace.cli, headrace.edge.daemon, headrace.edge.profile\n"
        f"loaded = {HEAVY!r} & {{name.split('.')[0] for name in sys.modules}}\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

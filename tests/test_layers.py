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
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                found.add(parts[1] if parts[0] == "headrace" and len(parts) > 1 else parts[0])
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 1:
                found.add(path.parent.name)
            elif node.level == 2:
                found |= {parts[0]} if parts[0] else {alias.name for alias in node.names}
            else:
                found.add(parts[1] if parts[0] == "headrace" and len(parts) > 1 else parts[0])
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_lies_below_them(folder):
    ours = {"models", "protos", "edge", "server", "bench", "cli"}
    modules = [p for p in (ROOT / folder).glob("*.py") if "_pb2" not in p.name]
    assert modules
    for path in modules:
        assert imported(path) & ours <= MAY_IMPORT[folder], path


def test_only_messages_imports_the_generated_classes():
    for folder in (*MAY_IMPORT, "bench"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "messages.py" and "_pb2" not in path.name:
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

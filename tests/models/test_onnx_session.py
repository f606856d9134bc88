"""Graphs of one process compute in the same memory: measured by what the process grows by."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from headrace.models.onnx_session import open_session

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from headrace.models.onnx_session import open_session
import onnxruntime

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

how = open_session if sys.argv[1] == "shared" else lambda path: onnxruntime.InferenceSession(str(path))
sessions = [how(Path(path)) for path in sys.argv[2:]]
feed = {"x": np.ones((1, 1024), np.float32)}
grown, answers = [], []
for session in sessions:
    before = resident()
    for _ in range(3):
        answers.append(float(session.run(None, feed)[0].sum()))
    grown.append(resident() - before)
print(json.dumps([grown, answers]))
"""
MIB = 2**20


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Each makes maps of 8 MiB and more, and ends in their sum."""
    paths = []
    for n in range(6):
        rows = 2048 + 64 * n
        shape = onnx.numpy_helper.from_array(np.array([rows, 1024]), "shape")
        nodes = [
            onnx.helper.make_node("Expand", ["x", "shape"], ["a"]),
            onnx.helper.make_node("Exp", ["a"], ["b"]),
            onnx.helper.make_node("Sin", ["b"], ["c"]),
            onnx.helper.make_node("ReduceSum", ["c"], ["y"]),
        ]
        given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1024])
        made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])
        graph = onnx.helper.make_graph(nodes, "graph", [given], [made], [shape])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        paths.append(tmp_path_factory.mktemp("graphs") / f"{n}.onnx")
        onnx.save(model, paths[-1])
    return paths


def _run(how: str, paths) -> tuple[list[int], list[float]]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, *map(str, paths)], capture_output=True, text=True, check=True, timeout=120
    )
    grown, answers = json.loads(run.stdout)
    return grown, answers


@pytest.mark.skipif(sys.platform != "linux", reason="MEMORY: resident memory is read from /proc")
def test_the_second_graph_takes_no_memory_of_its_own(graphs):
    (apart, expected), (shared, found) = (_run(how, graphs) for how in ("apart", "shared"))
    assert found == expected
    assert sum(shared[1:]) < 4 * MIB < 30 * MIB < sum(apart[1:]), (shared, apart)


def test_a_graph_that_takes_more_than_the_first_extent_runs(tmp_path):
    """Its maps of 96 MiB get an extent of their own."""
    shape = onnx.numpy_helper.from_array(np.array([24, 2**20]), "shape")
    nodes = [
        onnx.helper.make_node("Expand", ["x", "shape"], ["a"]),
        onnx.helper.make_node("Abs", ["a"], ["b"]),
        onnx.helper.make_node("ReduceMean", ["b"], ["y"]),
    ]
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])
    graph = onnx.helper.make_graph(nodes, "graph", [given], [made], [shape])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9),
        tmp_path / "large.onnx",
    )
    session = open_session(tmp_path / "large.onnx")
    for _ in range(2):
        (found,) = session.run(None, {"x": np.full((1, 1), -3, np.float32)})
        assert float(found[0, 0]) == pytest.approx(3)

"""The table of backbones, and answers of other tasks over a real stream between real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from headrace.bench.backbones import CLASSIFIERS, PACKAGED, REFUSED, TORCHVISION, Row, run, sources, table
from headrace.bench.material import write_photographs
from headrace.bench.processes import Process, Server
from headrace.models.bundle import Bundle
from headrace.models.export import export_edge_half
from headrace.models.split import fit_unmeasured
from headrace.models.zoo.catalogue import load_backbone, write_weights
from headrace.models.zoo.sources import Source


def test_a_few_rows_through_the_command_s_own_function(tmp_path, capsys):
    page = tmp_path / "docs" / "backbones.md"
    assert run(["timm/test_resnet", "timm/test_vit", "torchvision/maskrcnn_resnet50_fpn"], page) == 0
    said = capsys.readouterr().out
    assert "timm/test_resnet: " in said and " as in PyTorch" in said
    lines = page.read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| timm/")]
    assert [r[0] for r in rows] == ["| timm/test_resnet", "| timm/test_vit"]
    assert all(r[2] == "random" and float(r[6].split()[0]) <= 1e-5 for r in rows)
    assert any(line.startswith("- torchvision/maskrcnn_resnet50_fpn answers with more than boxes") for line in lines)


@pytest.mark.parametrize("name", ["efficientnet_lite1", pytest.param("efficientnet_lite2", marks=pytest.mark.slow)])
def test_weights_that_a_package_brings_are_used(name, tmp_path):
    page = tmp_path / "backbones.md"
    assert run([name], page) == 0
    (row,) = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(f"| {name}")]
    assert row[2] == "package"
    assert float(row[-1].rstrip(" |").split(", ")[1]) == 1, "the stream's answer is PyTorch's"


def test_an_unknown_name_is_a_failure(tmp_path):
    assert run(["timm/test_resnte"], tmp_path / "page.md") == 1


def test_the_table_is_of_25_architectures_and_more():
    names = [s.name for s in sources()]
    assert len(names) == len(set(names)) == len(PACKAGED) + len(CLASSIFIERS) + len(TORCHVISION)
    assert len(names) >= 25
    assert table([Row("x", reason="x is one layer")]).endswith("- x is one layer\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_backbone_of_the_table_is_cut_and_sent(tmp_path, capsys):
    """Those whose package is installed; it takes some twenty minutes on two cores."""
    installed = []
    for source in sources():
        try:
            if source.name in PACKAGED:
                load_backbone(source)
            installed.append(source.name)
        except Exception as error:
            assert "pip install" in str(error)
    assert run(installed, tmp_path / "page.md") == 0, capsys.readouterr().out
    assert "Not cut" in (tmp_path / "page.md").read_text()
    assert len(installed) - len(REFUSED) >= 25


STREAMED = {
    "detection": (Source("ssdlite320_mobilenet_v3_large", seed=1, size=160), "body.features.0.10"),
    "segmentation": (Source("lraspp_mobilenet_v3_large", seed=1, size=96), "net.backbone.3"),
    "classification+detection": (
        Source("own_models:Both", "classification+detection", size=32, labels=("a", "b", "c")),
        "boxes.body.1",
    ),
}


@pytest.mark.parametrize(
    "task", [pytest.param("detection", marks=pytest.mark.slow), "segmentation", "classification+detection"]
)
async def test_answers_come_back_over_a_real_stream(task, tmp_path, monkeypatch):
    """Boxes, a class map, or what two tails say of one packet."""
    source, at = STREAMED[task]
    own = str(Path(__file__).parents[1] / "models")
    monkeypatch.syspath_prepend(own)
    monkeypatch.setenv("PYTHONPATH", own)  # the server's
    backbone = load_backbone(source)
    pictures = await asyncio.to_thread(write_photographs, tmp_path / "pictures")
    paths = sorted(pictures.iterdir())[::12]
    bundle = fit_unmeasured(backbone, [at], paths[:8])
    bundle.save(tmp_path / "bundle")
    write_weights(backbone, tmp_path / "bundle")
    export_edge_half(Bundle.load(tmp_path / "bundle"), tmp_path / "half")
    server = await Server.listening(
        {"port": 0, "bundles": [tmp_path / "bundle"], "cache_dir": tmp_path / "cache"}, tmp_path / "server.log"
    )
    try:
        flags = {
            "server": server.address,
            "bundle": tmp_path / "half",
            "source": pictures,
            "max_frames": 4,
            "as_fast_as_possible": True,
            "point": f"{at}@0",
            "deadline_ms": 20_000,
            "cache_dir": tmp_path / "cache",
        }
        edge = await Process.start("edge", flags, tmp_path / "edge.log")
        try:
            lines = [line async for line in edge.lines() if line.get("event") == "frame"]
            assert await edge.wait(60) == 0, edge.log_end()
        finally:
            await edge.stop()
    finally:
        await server.stop()
    assert [line["outcome"] for line in lines] == ["ok"] * 4, Path(tmp_path / "server.log").read_text()[-2000:]
    for line in lines:
        assert line["bytes"] > 0 and bool(line["labels"]) == ("classification" in task)
        if task == "classification+detection":
            assert sum(x["score"] for x in line["labels"]) == pytest.approx(1, abs=1e-3)
        if "detection" in task:
            assert line["boxes"] and all(len(b["box"]) == 4 and b["label"] for b in line["boxes"])
            assert all(b["box"][0] >= -1 and b["box"][2] <= 289 for b in line["boxes"]), "pixels of the frame"
        else:
            assert (line["class_map"]["width"], line["class_map"]["height"]) == (96, 96)
            assert sum(c["share"] for c in line["class_map"]["classes"]) == pytest.approx(1, abs=1e-3)

"""docs/edge.md names every key of a line and every metric, and no other."""

import io
import json
import re
from pathlib import Path

from headrace.edge.engine import LocalAnswer
from headrace.edge.filtering import Audits
from headrace.edge.ledger import Ledger, Outcome
from headrace.edge.metrics import Metrics
from headrace.edge.report import STAGES, Report
from headrace.protos.messages import Box, Label

from .rig import PICTURE

PAGE = (Path(__file__).parents[2] / "docs" / "edge.md").read_text()
KEYS, METRICS = PAGE.split("## Metrics")


def first_cells(text: str) -> set[str]:
    return {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def lines() -> list[dict]:
    """A frame's line with all that can be in one, and a summary."""
    out = io.StringIO()
    report = Report(out, ["a", "b"], 0.0)
    ledger = Ledger(lambda _: None)
    frame = ledger.enter(1.0, 0.25, PICTURE)
    frame.labels, frame.boxes, frame.tails = (Label(1, 0.5),), (Box(0, 0.9, 1, 1, 2, 2),), ("detection",)
    frame.presence, frame.confidence = 0.4, 0.7
    frame.reserve = LocalAnswer((), 0.0, 0.0)
    ledger.answer(frame, Outcome.OK, 1.1)
    report.frame(frame, deadline_s=0.25, in_flight=0, rate_bps=1e6, connected=True)
    report.summary(ledger, 2.0, Audits(1, 0))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_every_key_of_a_line_is_explained_and_nothing_else():
    line, summary = lines()
    assert first_cells(KEYS) == line.keys() | {"class_map"}
    assert line["boxes"][0].keys() == {"index", "label", "score", "box"}
    told = KEYS.split("**summary**")[1]
    assert all(f"`{key}`" in told for key in summary)
    assert all(f"`{stage}`" in KEYS for stage in STAGES) and all(f"`{outcome}`" in KEYS for outcome in Outcome)


def test_the_example_is_a_line_as_they_are():
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    line, _ = lines()
    assert json.loads(example).keys() == line.keys() - {"boxes", "presence", "empty", "confidence"}


def test_every_metric_is_explained():
    families = Metrics().registry.collect()
    served = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    assert first_cells(METRICS) == served

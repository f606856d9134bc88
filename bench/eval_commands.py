"""Commands that measure a bundle: `headrace eval`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..models.command_line import COMMITTED, COMMITTED_DETECTION, BundleFolder, JsonFile
from ..models.exceptions import DataError

app = typer.Typer(no_args_is_help=True, help="Measure a bundle on labelled photographs.")

NONE = "none"

Limit = Annotated[int, typer.Option(help="At most this many photographs; 0 for all.")]


class Baselines(StrEnum):
    """What `headrace eval rd` can measure beside our operating points and pictures."""

    TRAINING_FREE = "training-free"


@app.command("rd")
def eval_rd(
    data: Annotated[Path, typer.Option(help="Folder of photographs, files or folders named by WordNet id.")],
    bundle: BundleFolder = COMMITTED,
    limit: Limit = 0,
    json: JsonFile = None,
    baselines: Annotated[
        Baselines | None, typer.Option(help="Also run these codecs; training-free: from papers, at the same cuts.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of photographs to calibrate the baselines on: those the bundle saw.")
    ] = None,
    photographs: Annotated[int, typer.Option(help="Photographs to calibrate the baselines on.")] = 300,
    at: Annotated[
        list[str] | None, typer.Option(help="Split point for the baselines; the bundle's own by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for rate-accuracy.csv and rate-accuracy.png.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps what is measured: a run that was stopped goes on from there.")
    ] = None,
    pictures: Annotated[
        list[str] | None, typer.Option(help="Picture codec to measure, or none; several times. [default: all]")
    ] = None,
    entropic_student: Annotated[
        Path | None, typer.Option(help="File or folder that `train-student` wrote, to measure that baseline too.")
    ] = None,
    own: Annotated[
        list[str] | None, typer.Option(help="Split point of ours to measure, or none; several times. [default: all]")
    ] = None,
) -> None:
    """Bytes against accuracy for every operating point, beside JPEG, WebP and AVIF on the same photographs.

    With 95 % intervals, BD-rates, and what head and encoder of every split point compute.
    """
    from ..models.bundle import Bundle
    from ..models.evaluate import Others, evaluate_rate_distortion
    from ..models.evaluation.pictures import QUALITIES

    others: Others | None = None
    if baselines is not None:
        from .training_free.run import TrainingFree

        if calibration is None:
            raise DataError("--baselines needs --calibration, a folder of photographs such as the bundle was made from")
        others = TrainingFree(calibration, photographs, tuple(at or ()))
    evaluate_rate_distortion(
        Bundle.load(bundle),
        data,
        limit,
        json,
        others=others,
        output=output,
        work=work,
        codecs=_chosen(pictures) if pictures else tuple(QUALITIES),
        student=entropic_student,
        own=_chosen(own) if own else None,
    )


def _chosen(names: list[str]) -> tuple[str, ...]:
    return () if names == [NONE] else tuple(names)


@app.command("train-student")
def eval_train_student(
    photographs: Annotated[list[Path], typer.Option(help="Folder of unlabelled photographs; several times.")],
    output: Annotated[Path, typer.Option(help="Folder for one file a rate, for `eval rd --entropic-student`.")],
    bundle: BundleFolder = COMMITTED,
    views: Annotated[int, typer.Option(help="Parts of photographs to learn from, both stages together.")] = 100_000,
    target: Annotated[
        list[int] | None, typer.Option(help="Bytes of a packet; several times. [default: 1000, 2000, 4000]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Views a step.")] = 64,
    tuned: Annotated[
        int, typer.Option(min=0, max=4, help="How many of the tail's four parts are tuned in full, of others biases.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of views, noise and first weights.")] = 0,
    work: Annotated[Path | None, typer.Option(help="Folder for checkpoints. [default: OUTPUT/work]")] = None,
    device: Annotated[str, typer.Option(help="Where to learn: cpu or cuda.")] = "cpu",
) -> None:
    """Learn an Entropic Student for the bundle's backbone, one a rate: a baseline to measure beside ours.

    A run that was killed goes on where it was when the same command is given again.
    """
    from ..models.baselines.student_lesson import StudentPlan
    from ..models.baselines.student_train import train_student
    from ..models.bundle import Bundle
    from ..models.zoo.catalogue import backbone_of

    plan = StudentPlan(tuple(target) if target else StudentPlan.targets, batch, tuned=tuned, seed=seed)
    backbone = backbone_of(Bundle.load(bundle))
    for path in train_student(backbone, photographs, output, work or output / "work", plan, views, device):
        typer.echo(str(path))


@app.command("front")
def eval_front(
    data: Annotated[Path | None, typer.Option(help="Folder of labelled photographs, as for `eval rd`.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="What `eval rd --json` wrote, instead of measuring again.")
    ] = None,
    bundle: BundleFolder = COMMITTED,
    limit: Limit = 0,
    json: JsonFile = None,
    output: Annotated[Path | None, typer.Option(help="Folder for front.csv and front.png.")] = None,
) -> None:
    """Bytes for 0.95 (0.98, 0.90) of the uncut accuracy against the device's compute, one point a split point."""
    from ..models.bundle import Bundle
    from ..models.evaluate import evaluate_rate_distortion
    from ..models.evaluation.front import read_rd, report_front
    from ..models.evaluation.plots import need_matplotlib

    if (data is None) == (measured is None):
        raise DataError("give either --data, a folder of photographs, or --from, a file that `eval rd --json` wrote")
    if output is not None:
        need_matplotlib()
    found = read_rd(measured) if measured else evaluate_rate_distortion(Bundle.load(bundle), data or Path(), limit)
    report_front(found, json, output)


@app.command("detection")
def eval_detection(
    data: Annotated[Path, typer.Option(help="Folder with images/ and YOLO's text files in labels/.")],
    bundle: BundleFolder = COMMITTED_DETECTION,
    limit: Annotated[int, typer.Option(help="At most this many pictures; 0 for all.")] = 0,
    json: JsonFile = None,
    output: Annotated[Path | None, typer.Option(help="Folder for detection.csv and detection.png.")] = None,
) -> None:
    """Bytes against COCO's mAP for every operating point, beside JPEG, WebP and AVIF on the same pictures."""
    from ..models.bundle import Bundle
    from ..models.detection.evaluate import evaluate_detection

    evaluate_detection(Bundle.load(bundle), data, limit, json, output)


@app.command("video")
def eval_video(
    video: Annotated[Path, typer.Option(help="Video file.")],
    bundle: BundleFolder = COMMITTED,
    fps: Annotated[list[float] | None, typer.Option(help="Frames a second; several times. [default: its own]")] = None,
    behind: Annotated[int, typer.Option(help="Frames by which answers lag behind.")] = 0,
    hysteresis: Annotated[float, typer.Option(help="As for `headrace edge`; 0 keeps the symbols.")] = 0.0,
    limit: Annotated[int, typer.Option(help="At most this many of the video's frames; 0 for all.")] = 0,
    json: JsonFile = None,
) -> None:
    """Bytes of a video's frames for every operating point: each by itself, and predicted from an earlier one."""
    from ..models.bundle import Bundle
    from .video import Lag, evaluate_video

    how = Lag(behind, hysteresis)
    evaluate_video(Bundle.load(bundle), video, tuple(fps or ()), how, limit=limit, json_file=json)

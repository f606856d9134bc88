"""What `headrace train` makes: one small TOML file a bundle.

bundle = "efficientnet_lite0"      # folder of the bundle that gets the split points; its others stay
name = "slim"                      # they are called slim-25, slim-50, ...
anchor = "blocks.2"                # behind which stage the synthesis gives the backbone's features
seed = 0

[encoder]
latent = 64
widths = { 25 = [4, 8, 8, 24, 16, 24, 32, 40], 100 = [2, 16, 16, 48, 24, 48, 72, 40] }

[[stages]]                         # towards the uncut model's features, then towards its answers
towards = "features"
steps = 8000
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..exceptions import DataError
from .cut import INPUT
from .slimmable import CHANNELS, family, fault

Channels = tuple[int, ...]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderPlan(_Part):
    """The slimmable encoder, see `slimmable`."""

    latent: int = Field(64, ge=1, le=512, description="Channels of the latent.")
    widths: dict[str, Channels] = Field(
        min_length=1,
        description="Name of each width, narrowest first -> its stem's stride and channels, see `slimmable`.",
    )

    kept: tuple[str, ...] = Field((), description="Widths that become split points; all of them where none is named.")

    @field_validator("widths")
    @classmethod
    def _rising(cls, widths: dict[str, Channels]) -> dict[str, Channels]:
        before: dict[str, Channels] = {}
        for name, channels in widths.items():
            if not name.isalnum():
                raise ValueError(f"width {name!r} needs a plain name")
            if wrong := fault(channels):
                raise ValueError(f"width {name!r} {wrong}")
            if (len(channels) == CHANNELS) != (len(next(iter(widths.values()))) == CHANNELS):
                raise ValueError(f"width {name!r} is of another form than the first one")
            if any(a < b for a, b in zip(channels, before.get(family(channels), ()), strict=False)):
                raise ValueError(f"width {name!r} has fewer channels than the width before it; order them by size")
            before[family(channels)] = channels
        return widths

    @field_validator("kept")
    @classmethod
    def _known(cls, kept: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name in kept:
            if name not in info.data.get("widths", {name: ()}):
                raise ValueError(f"there is no width {name!r}")
        return kept

    @property
    def taken(self) -> dict[str, Channels]:
        """The widths that become split points."""
        return {name: channels for name, channels in self.widths.items() if not self.kept or name in self.kept}


class Stage(_Part):
    """One stage of training; its learning rate rises and falls along a cosine of its own."""

    towards: Literal["features", "answers"] = Field(description="What the loss compares with the uncut model's.")
    steps: int = Field(ge=1, description="Batches.")
    batch: int | None = Field(None, ge=4, description="Views a step, in place of the plan's.")
    widest: float | None = Field(None, gt=0, lt=1, description="In place of the plan's.")
    rate: float = Field(2e-3, gt=0, description="Learning rate at its height.")
    ramp: float = Field(0.0, ge=0, le=1, description="Share of the steps over which bits come to their full price.")
    noise: float = Field(0.0, ge=0, le=1, description="Share of the steps in which noise stands for rounding.")
    encoder: bool = Field(True, description="Whether the encoder learns too, or the server's half alone.")
    tail: bool = Field(False, description="Whether the rest of the backbone learns too, a change of low rank.")
    worth: float = Field(
        1.0,
        gt=0,
        description="Nats of the metric that a nat of the answers' divergence counts as; a detector's metric is of a "
        "projection of its answers, and smaller.",
    )
    mix: float = Field(0.0, ge=0, le=1, description="Share of the views that are two photographs laid over each other.")
    later: dict[str, float] = Field(
        {},
        description="Split points behind the anchor -> nats that an error of the map there as large as what it varies "
        "by counts as, beside the answers' divergence.",
    )


class TrainPlan(_Part):
    """See the module's docstring."""

    bundle: Path
    begin: Literal["backbone", "bundle"] = Field(
        "backbone", description="What the networks begin as: the backbone's first stages, or those of the bundle."
    )
    name: str = Field("slim", pattern=r"^[a-z][a-z0-9_]{0,15}$")
    anchor: str = INPUT
    seed: int = Field(0, ge=0)
    batch: int = Field(48, ge=4, description="Views a step.")
    widest: float = Field(
        0.5, gt=0, lt=1, description="Share of them at the widest width; two others have a half of what is left each."
    )
    views: int = Field(8000, ge=16, description="Views kept at a time, 220 KB each for 224 pixels.")
    fresh: int = Field(2, ge=0, description="Views replaced a step by new ones.")
    price: float = Field(
        2000.0,
        gt=0,
        description="Bits that a nat of disturbance is worth at gain 1, in proportion to the gain squared.",
    )
    gains: float = Field(4.0, ge=1, description="Gains are drawn from 1 to this, evenly on a logarithmic scale.")
    encoder: EncoderPlan
    synthesis: tuple[tuple[int, int, int], ...] = Field(
        min_length=1, description="Channels, hidden channels and number of blocks of each level, see `synthesis`."
    )
    scenes: bool = Field(False, description="Learn from a detector's scenes, see `gallery`; drawn anew for every step.")
    tail_kept: float = Field(
        0.8, gt=0, le=1, description="Share of the energy of each matrix's change that stays in the bundle, see `lean`."
    )
    distortions: dict[str, tuple[float, ...]] = Field(
        {}, description="Width -> its rate levels, finest first, in place of the usual ones; see `fit.DISTORTIONS`."
    )
    average: float = Field(
        0.0, ge=0, lt=1, description="What a running average of the weights keeps of itself a step; it ends a stage."
    )
    tail_rank: int = Field(0, ge=0, description="Of the change of the rest of the backbone; 0 leaves it as it is.")
    eight_bits: bool = Field(False, description="Whether the bundle has the server's kernels in eight bits.")
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        for width, levels in self.distortions.items():
            if width not in self.encoder.taken:
                raise ValueError(f"distortions are given for {width!r}, which does not become a split point")
            if not levels or list(levels) != sorted(set(levels)) or levels[0] <= 0:
                raise ValueError(f"the distortions of {width!r} have to rise from above 0")
        most = max(self.batch, *(stage.batch or 0 for stage in self.stages))
        if self.views < most:
            raise ValueError(
                f"{most} views a step are drawn from the {self.views} that are kept; say views = {most} or more"
            )
        if any(stage.tail for stage in self.stages) and not self.tail_rank:
            raise ValueError("a stage has tail = true; say of what tail_rank the change may be")
        return self

    @property
    def later(self) -> tuple[str, ...]:
        """Split points behind the anchor that any stage looks at."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.later))

    @classmethod
    def load(cls, path: Path) -> TrainPlan:
        """Read a TOML file; a relative `bundle` is one beside the file.

        Raises:
            DataError: it cannot be read, or a value is missing, unknown or out of range; the text says which.
        """
        try:
            with path.open("rb") as file:
                plan = cls(**tomllib.load(file))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from error
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{path} is not TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise DataError(f"{path}: {where or 'it'}: {first['msg']}") from error
        return plan.model_copy(update={"bundle": path.parent / plan.bundle})

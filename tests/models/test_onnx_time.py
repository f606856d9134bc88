"""Shares of time are of what a device really does: the packets of photographs, made by the real codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace.models.bitstream import Packet
from headrace.models.codec import Codec
from headrace.models.export import write_graph
from headrace.models.onnx_time import coding_milliseconds


class Repeat(torch.nn.Module):
    """A head for [1, 16, 16, 3] pixels: the first of them, as a latent float32 [1, 6, 5, 4]."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :120].reshape(-1, 6, 5, 4).float() / 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "a.onnx"
    write_graph(Repeat(), torch.zeros(1, 16, 16, 3, dtype=torch.uint8), "pixels", "latent", path)
    return path


def test_every_picture_given_is_coded(small_bundle, path, monkeypatch):
    split = small_bundle.split("a")
    point = small_bundle.feature_point("a", 1)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 40 * i, (16, 16, 3), dtype=np.uint8) for i in (1, 3, 6)]
    made: list[Packet] = []
    compress = Codec.compress

    def watched(self: Codec, *given: object) -> Packet:
        made.append(compress(self, *given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(Codec, "compress", watched)
    assert coding_milliseconds(small_bundle, split, path, pictures) > 0
    monkeypatch.undo()
    codec = Codec(small_bundle)
    latents = [Repeat()(torch.from_numpy(each[None])).numpy()[0] for each in pictures]
    alone = [codec.compress(latent, point, 0).to_bytes() for latent in latents]
    assert len(set(alone)) == 3
    # The first one twice more: what is made once does not count.
    assert [packet.to_bytes() for packet in made] == [each for i in (0, 0, 1, 2) for each in [alone[i]] * 2]

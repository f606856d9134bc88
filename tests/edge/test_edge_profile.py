"""Profiles: measured on this device, kept by bundle and device, used when they fit."""

from __future__ import annotations

import json

import pytest
from headrace.edge.assembly import make_ready
from headrace.edge.config import EdgeSettings
from headrace.edge.exceptions import ConfigError
from headrace.edge.profile import profile, read_profile
from headrace.models.edge_half import load_edge_half


def settings(edge_half, tmp_path, **flags) -> EdgeSettings:
    return EdgeSettings.load(bundle=edge_half, cache_dir=tmp_path, **flags)


def test_a_profile_times_every_stage_and_is_used_by_the_daemon(edge_half, tmp_path):
    given = settings(edge_half, tmp_path)
    bundle = load_edge_half(edge_half)
    assert read_profile(given, bundle.fingerprint) is None
    measured = profile(given, rounds=3)
    assert set(measured.stages_ms) == {"stage.1", "webp", "jpeg", "local"}
    assert set(measured.points) == {p.name for p in bundle.operating_points}
    assert (measured.device, measured.factor) == ("native", 1.0)
    assert measured.path.parent == tmp_path / "profiles"
    assert json.loads(measured.path.read_text())["fingerprint"] == bundle.fingerprint.hex()
    assert read_profile(given, bundle.fingerprint) == measured
    assert make_ready(bundle, given).compute_s == measured.seconds()


def test_a_profile_of_another_device_or_bundle_is_not_used(edge_half, other_half, tmp_path):
    measured = profile(settings(edge_half, tmp_path), rounds=1)
    fingerprint = load_edge_half(edge_half).fingerprint
    other = load_edge_half(other_half).fingerprint
    assert read_profile(settings(edge_half, tmp_path, device_speed=0.5), fingerprint) is None
    assert read_profile(settings(other_half, tmp_path), other) is None
    with pytest.raises(ConfigError, match=r"is for bundle .* on device native"):
        read_profile(settings(other_half, tmp_path, profile=measured.path), other)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 3}', "{" * 1000])
def test_a_damaged_profile_is_measured_anew_unless_it_was_named(edge_half, tmp_path, content):
    path = profile(settings(edge_half, tmp_path), rounds=1).path
    path.write_text(content)
    fingerprint = load_edge_half(edge_half).fingerprint
    assert read_profile(settings(edge_half, tmp_path), fingerprint) is None
    with pytest.raises(ConfigError, match="make it anew with `headrace profile`"):
        read_profile(settings(edge_half, tmp_path, profile=path), fingerprint)

"""Settings: where they come from, which goes first, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace.edge.assembly import frame_interval_s, make_control, select_points
from headrace.edge.config import EdgeSettings
from headrace.edge.exceptions import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("HEADRACE_EDGE_"):
            monkeypatch.delenv(name)


def test_flag_goes_before_environment_before_file(tmp_path, monkeypatch):
    config = tmp_path / "edge.toml"
    config.write_text('[edge]\nserver = "file:1"\ndeadline_ms = 100\nfps = 5\n')
    monkeypatch.setenv("HEADRACE_EDGE_DEADLINE_MS", "200")
    monkeypatch.setenv("HEADRACE_EDGE_FPS", "6")
    loaded = EdgeSettings.load(config, fps=7.0, loop=None)
    assert (loaded.server, loaded.deadline_ms, loaded.fps, loaded.loop) == ("file:1", 200, 7, False)
    assert EdgeSettings.load(None).server == "127.0.0.1:50051", "one file's values stay in one load"


def test_a_file_without_a_table_is_read_too(tmp_path):
    config = tmp_path / "edge.toml"
    config.write_text('server = "file:1"\nsource = ["a.mp4", "b"]\n[server_table]\nport = 3\n')
    loaded = EdgeSettings.load(config)
    assert (loaded.server, loaded.source) == ("file:1", ["a.mp4", "b"])


@pytest.mark.parametrize("text", ["a.mp4, b c.mp4", '["a.mp4", "b c.mp4"]'])
def test_lists_in_the_environment(text, monkeypatch):
    monkeypatch.setenv("HEADRACE_EDGE_SOURCE", text)
    assert EdgeSettings.load().source == ["a.mp4", "b c.mp4"]


def test_the_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert EdgeSettings.load().cache_dir == Path("/somewhere/headrace")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert EdgeSettings.load().cache_dir == Path.home() / ".cache" / "headrace"


def test_every_setting_is_described():
    missing = [name for name, field in EdgeSettings.model_fields.items() if not field.description]
    assert missing == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"deadline_ms": -1}, r"--deadline-ms \(or HEADRACE_EDGE_DEADLINE_MS\) is -1"),
        ({"fps": "fast"}, "--fps"),
        ({"kinds": ["feature", "video"]}, "'video' is no kind of operating point; there are feature, image, local"),
        ({"device_speed": 0.1, "device_uncut_ms": 150}, "give one of them"),
        ({"reconnect_min_s": 5, "reconnect_max_s": 1}, "reconnect_min_s is larger"),
        ({"speed": 3}, "there is no setting 'speed'"),
        ({"log_level": "loud"}, "--log-level"),
        ({"bytes_per_day": float("inf")}, "--bytes-per-day"),
        ({"deadline_ms": float("nan")}, "--deadline-ms"),
    ],
)
def test_bad_values_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        EdgeSettings.load(**flags)


def test_a_flag_takes_the_place_of_what_says_the_same_in_another_way(tmp_path, monkeypatch):
    file = tmp_path / "edge.toml"
    file.write_text("device_speed = 0.1\nobjective = 'bytes'\naccuracy_floor = 0.8\n")
    settings = EdgeSettings.load(file, device_uncut_ms=150, objective="accuracy")
    assert (settings.device_speed, settings.device_uncut_ms, settings.accuracy_floor) == (None, 150, None)
    monkeypatch.setenv("HEADRACE_EDGE_DEVICE_UNCUT_MS", "120")
    assert EdgeSettings.load(file).device_speed is None
    assert EdgeSettings.load(file, device_speed=0.5).device_uncut_ms is None
    assert EdgeSettings.load(file, objective="compute").accuracy_floor == 0.8


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read: No such file"):
        EdgeSettings.load(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("server = ")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        EdgeSettings.load(tmp_path / "bad.toml")
    (tmp_path / "unknown.toml").write_text("[edge]\nsevrer = 'x:1'\n")
    with pytest.raises(ConfigError, match=r"there is no setting 'sevrer' in .*unknown\.toml"):
        EdgeSettings.load(tmp_path / "unknown.toml")


def test_points_are_restricted_by_kind_or_name(bundle):
    names = lambda **flags: [p.name for p in select_points(bundle, EdgeSettings.load(**flags))]  # noqa: E731
    assert names() == ["stage.1@0", "stage.1@1", "webp@50", "jpeg@50", "local"]
    assert names(kinds=["image", "local"]) == ["webp@50", "jpeg@50", "local"]
    assert names(point="stage.1@1") == ["stage.1@1"]
    with pytest.raises(ConfigError, match=r"no operating point 'stage\.9@0' to fix with --point; there are stage\.1@0"):
        names(point="stage.9@0")


def test_the_control_loop_gets_only_what_the_server_decodes(bundle):
    from headrace.edge.assembly import Half

    half = Half(None, select_points(bundle, EdgeSettings.load()), {"local": 0.1}, 0.1)
    assert [p.name for p in make_control(half, EdgeSettings.load(), 0.1, (0, 41)).points] == [
        "stage.1@0",
        "jpeg@50",
        "local",
    ]


def test_the_frame_interval_is_the_set_one_or_the_fastest_source_s():
    assert frame_interval_s(EdgeSettings.load(fps=20), [25.0]) == 0.05
    assert frame_interval_s(EdgeSettings.load(), [10.0, 25.0, None]) == 0.04
    assert frame_interval_s(EdgeSettings.load(), [None]) == 0.1
    assert frame_interval_s(EdgeSettings.load(as_fast_as_possible=True, deadline_ms=300), [25.0]) == 0.3


def test_objective_goes_with_its_floor():
    saving = EdgeSettings(objective="bytes", accuracy_floor=0.8, bytes_per_day=1e6)
    assert (saving.objective, saving.accuracy_floor, saving.bytes_per_day) == ("bytes", 0.8, 1e6)
    for wrong in ({"objective": "compute"}, {"accuracy_floor": 0.8}, {"objective": "speed"}, {"bytes_per_day": 0}):
        with pytest.raises(ConfigError):
            EdgeSettings.load(None, **wrong)

"""Where settings come from, and what is said about wrong ones."""

import os
from pathlib import Path

import pytest
from headrace.models.bundle import MANIFEST
from headrace.server.config import SHIPPED_BUNDLE, ServerSettings
from headrace.server.exceptions import SettingsError


def test_defaults_serve_the_bundle_that_ships() -> None:
    settings = ServerSettings.load()
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 50051, None)
    assert settings.bundles == [SHIPPED_BUNDLE]
    assert (SHIPPED_BUNDLE / MANIFEST).is_file()


def test_flag_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("port = 1\nqueue_limit = 11\nmax_batch = 21\n")
    monkeypatch.setenv("HEADRACE_SERVER_PORT", "2")
    monkeypatch.setenv("HEADRACE_SERVER_QUEUE_LIMIT", "12")
    settings = ServerSettings.load(file, port=3, queue_limit=None)
    assert (settings.port, settings.queue_limit, settings.max_batch) == (3, 12, 21)
    assert ServerSettings.load(port=3).max_batch == 8, "a file must not outlive its load"


def test_one_file_can_hold_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text('[edge]\nserver = "a:1"\n[server]\nport = 4\nbundles = ["b"]\n')
    settings = ServerSettings.load(file)
    assert (settings.port, settings.bundles) == (4, [Path("b")])


def test_bundles_are_separated_like_a_path_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SERVER_BUNDLES", os.pathsep.join(("a", "b/c")))
    assert ServerSettings.load().bundles == [Path("a"), Path("b/c")]
    assert ServerSettings.load(bundles=[Path("d")]).bundles == [Path("d")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1\n", "there is no setting 'prot' in .*headrace.toml"),
        ("port = 70000\n", r"--port \(or HEADRACE_SERVER_PORT\) is 70000"),
        ('device = "tpu"\n', "--device .* is 'tpu'"),
        ("bundles = []\n", "--bundles"),
        ("port = \n", "is not TOML"),
        ("server = 1\n", r"write \[server\]"),
    ],
)
def test_a_wrong_file_is_named_with_its_setting(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        ServerSettings.load(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.toml cannot be read"):
        ServerSettings.load(tmp_path / "nowhere.toml")


def test_every_setting_is_described() -> None:
    assert [name for name, field in ServerSettings.model_fields.items() if not field.description] == []

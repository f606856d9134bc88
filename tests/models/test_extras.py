"""What a device's installation leaves out: the list agrees with pyproject.toml, and its absence is told in one line."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from headrace.models.extras import EXTRAS, how_to_install, missing

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_module_comes_with_its_extra_and_with_no_device(extra):
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    named = {plain(re.split(r"[\[<>=; ]", each)[0]) for each in project["optional-dependencies"][extra]}
    edge = {plain(re.split(r"[\[<>=; ]", each)[0]) for each in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    for module in EXTRAS[extra]:
        if module not in distributions:  # an extra that is not installed here: by its own name
            assert module in named
            continue
        found = {plain(name) for name in distributions[module]}
        assert any(name in named or any(n.startswith(f"{name}-") for n in named) for name in found), (module, found)
        assert not found & edge, module


def test_modules_of_no_extra_are_not_explained_away():
    assert missing(ModuleNotFoundError(name="headrace.models.gone")) == ""
    assert missing(ModuleNotFoundError(name="torch.nowhere")) == (
        f"torch is not installed, which this command needs; {how_to_install('server')}"
    )


@pytest.mark.parametrize(
    "arguments", [["serve", "--port", "0"], ["split", "resnet50", "--list"], ["eval", "front", "--data", "DIR"]]
)
def test_a_command_that_needs_torch_says_so_in_one_line(arguments, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['headrace', *sys.argv[1:]]; "
        "from headrace.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(a.replace("DIR", str(tmp_path)) for a in arguments)],
        check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == f"headrace: {missing(ModuleNotFoundError(name='torch'))}"

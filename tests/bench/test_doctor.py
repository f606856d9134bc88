"""`headrace doctor`: what it prints is what to type."""

import io

from headrace.bench import doctor
from headrace.models.extras import how_to_install
from rich.console import Console


def test_a_missing_package_is_named_with_a_remedy_that_can_be_pasted(monkeypatch):
    monkeypatch.setattr(doctor, "SERVER_PACKAGES", ("numpy", "no-such-package"))
    said = io.StringIO()
    assert doctor.examine(console=Console(file=said, soft_wrap=True)) in (0, 1)  # other faults are this machine's own
    lines = said.getvalue().splitlines()
    (number,) = [i for i, line in enumerate(lines) if "server packages missing: no-such-package" in line]
    assert lines[number].startswith("note")
    assert lines[number + 1].strip() == f"-> {how_to_install('server')} (not needed on a device)"
    assert "[server]" in lines[number + 1]

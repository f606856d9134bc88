"""The emulated device: how long stages take, in exact numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from headrace.edge.assembly import make_engine
from headrace.edge.config import EdgeSettings
from headrace.edge.device import Device
from headrace.edge.exceptions import ConfigError
from headrace.models.edge_half import load_edge_half


class FakeTime:
    """Elapsed and processor time that a stage spends as told."""

    def __init__(self) -> None:
        self.elapsed = self.cpu = 0.0
        self.slept: list[float] = []

    def spend(self, cpu: float, stolen: float = 0.0) -> str:
        self.cpu += cpu
        self.elapsed += cpu + stolen
        return "result"

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.elapsed += seconds

    def device(self, factor: float) -> Device:
        return Device(factor, clock=lambda: self.elapsed, cpu_clock=lambda: self.cpu, sleep=self.sleep)


def test_a_stage_is_stretched_by_the_factor():
    time = FakeTime()
    assert time.device(25.0).run(lambda: time.spend(0.004)) == ("result", pytest.approx(0.1))
    assert time.slept == [pytest.approx(0.096)]
    assert time.device(25.0).time(lambda: time.spend(0.004)) == pytest.approx(0.1)
    assert len(time.slept) == 1


def test_time_that_others_took_is_not_stretched():
    time = FakeTime()
    assert time.device(10.0).run(lambda: time.spend(0.01, stolen=0.03))[1] == pytest.approx(0.1)
    assert time.device(10.0).run(lambda: time.spend(0.01, stolen=0.5))[1] == pytest.approx(0.51)


def test_what_the_camera_would_do_is_not_stretched():
    time = FakeTime()
    assert time.device(10.0).run(lambda: time.spend(0.01), stretched=False) == ("result", pytest.approx(0.01))


def test_the_machine_as_it_is_waits_for_nothing():
    time = FakeTime()
    assert time.device(1.0).run(lambda: time.spend(0.01, stolen=0.02)) == ("result", pytest.approx(0.03))
    assert time.slept == []


def test_device_uncut_ms_makes_the_uncut_model_take_that_long(edge_half):
    """With a processor clock on which every stage takes 4 ms: other programs on this machine cannot make it fail."""
    engine = make_engine(load_edge_half(edge_half), EdgeSettings())
    time = FakeTime()

    def cpu_clock() -> float:
        time.spend(0.004)
        return time.cpu

    engine.device = Device(clock=lambda: time.elapsed, cpu_clock=cpu_clock, sleep=time.sleep)
    assert engine.emulate(200) == pytest.approx(50)
    assert engine.answer(None, np.zeros((32, 32, 3), np.uint8)).compute_s == pytest.approx(0.2)


def test_settings_reach_the_device(edge_half):
    bundle = load_edge_half(edge_half)
    assert make_engine(bundle, EdgeSettings(device_uncut_ms=200)).device.factor > 1
    assert make_engine(bundle, EdgeSettings(device_speed=0.04)).device.factor == pytest.approx(25)
    assert make_engine(bundle, EdgeSettings()).device.factor == 1


def test_a_machine_that_is_too_slow_for_the_emulated_device_says_so(edge_half):
    with pytest.raises(ConfigError, match="--device-uncut-ms"):
        make_engine(load_edge_half(edge_half), EdgeSettings(device_uncut_ms=1e-6))


def test_pinning_keeps_every_thread_to_one_core():
    core = max(os.sched_getaffinity(0))
    program = (
        "import os, threading; from headrace.edge.device import pin; e = threading.Event();"
        "t = threading.Thread(target=e.wait); t.start(); pin(None);"
        "print([sorted(os.sched_getaffinity(int(i))) for i in os.listdir('/proc/self/task')]); e.set()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([[core], [core]])


def test_a_core_that_is_not_there_is_refused():
    with pytest.raises(subprocess.CalledProcessError) as error:
        subprocess.run(
            [sys.executable, "-c", "from headrace.edge.device import pin; pin(100000)"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "core 100000 cannot be used; --cpu takes one of" in error.value.stderr

"""Nothing stays behind on the machine after an end or a signal; what a killed run left, the next one removes."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headrace import cli
from headrace.bench.doctor import examine_machine
from headrace.bench.exceptions import LinkError
from headrace.bench.links import emulators, namespaces
from headrace.bench.links.listening import listening_on
from headrace.bench.links.namespaces import Namespaces, remove_stale
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.tun_relay import TunRelayLink

from .traffic import free_port, need

pytestmark = pytest.mark.timeout(90)
SERVE = "import socket, sys; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); c, _ = s.accept(); c.recv(1)"
EDGE = (
    "import socket, sys, time; h, p = sys.argv[1].split(':'); c = socket.create_connection((h, int(p)));"
    "print('connected', flush=True); time.sleep(float(sys.argv[2]))"
)


def command(code: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-c", code, *arguments])


def emulate(*arguments: str, edge_s: float = 60, serve: str = SERVE) -> subprocess.Popen[str]:
    """A `headrace emulate` whose edge connects and then waits."""
    pair = ["--server", command(serve, "{host}", "{port}"), "--edge", command(EDGE, "{server}", str(edge_s))]
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.cli", "emulate", *pair, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(pid: int) -> list[str]:
    return sorted(path.name for path in Path("/run/netns").glob(f"headrace-{pid}-*"))


def until_connected(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n", process.communicate()[1]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_removes_everything(number):
    need("tun")
    with emulate("--emulator", "tun", "--delay-ms", "5") as process:
        until_connected(process)
        assert len(left_behind(process.pid)) == 2
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert left_behind(process.pid) == []


def test_what_a_killed_run_left_behind_is_removed_by_the_next():
    need("tun")
    with emulate("--emulator", "tun") as process:
        until_connected(process)
        names = left_behind(process.pid)
        children = [int(pid) for name in names for pid in namespaces.ip("netns", "pids", name).split()]
        assert len(children) == 2  # server and edge
        process.kill()
        process.wait(30)
    assert left_behind(process.pid) == names
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end, "children outlive a killed run"
        time.sleep(0.05)
    with Namespaces() as spaces:
        assert left_behind(process.pid) == []
        own = set(spaces.names.values())
        assert remove_stale() == []  # a living program's are left alone
        assert own <= {path.name for path in Path("/run/netns").iterdir()}
    assert not own & {path.name for path in Path("/run/netns").iterdir()}


def test_a_pair_of_commands_over_the_best_link(tmp_path):
    """The whole way of `headrace emulate`, on whatever this machine has."""
    file = tmp_path / "passed.json"
    with emulate("--up-mbps", "8", "--delay-ms", "20", "--json", str(file), edge_s=0.3) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "connected\n"
    emulator, why = emulators.choose()
    assert why in " ".join(err.split())
    said = json.loads(file.read_text())
    assert said["emulator"] == emulators.KINDS[emulator]
    assert said["code"] == 0
    if emulator == "tun":
        assert said["up_counts"]["packets"] >= 3  # at least the handshake and the end
        assert 0.3 < said["seconds"] < 10
    assert left_behind(process.pid) == []


def test_the_proxy_form_joins_two_addresses(tmp_path):
    file, port = tmp_path / "passed.json", free_port()
    server = subprocess.Popen([sys.executable, "-c", SERVE, "127.0.0.1", str(port)])
    listen = free_port()
    addresses = ["--listen", f"127.0.0.1:{listen}", "--to", f"127.0.0.1:{port}"]
    with subprocess.Popen(
        [sys.executable, "-m", "headrace.cli", "emulate", *addresses, "--up-mbps", "1", "--json", str(file)],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 30
        while not listening_on(process.pid, listen) or not listening_on(server.pid, port):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        subprocess.run(
            [sys.executable, "-c", EDGE.replace("print", "c.sendall(b'x');print"), addresses[1], "0.2"], check=True
        )
        assert server.wait(10) == 0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "lost at random" in err
    assert json.loads(file.read_text())["up_counts"]["bytes"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to put behind the link"),
        (["--server", "true"], "say what to put behind the link"),
        (["--server", "true", "--edge", "true", "--listen", "127.0.0.1:0"], "say what to put behind the link"),
        (["--server", "true", "--edge", "no-such-program"], "no program 'no-such-program'"),
        (["--server", "'", "--edge", "true"], "cannot be read"),
        (["--server", "true", "--edge", "true", "--emulator", "pigeon"], "no emulator 'pigeon'"),
        (["--server", "false", "--edge", "true", "--emulator", "proxy"], "ended with code 1 before it listened"),
        (["--listen", "127.0.0.1:0", "--to", "nowhere"], "write HOST:PORT"),
        (["--listen", "192.0.2.1:80", "--to", "127.0.0.1:80"], "choose another address"),
        (["--server", "true", "--edge", "true", "--json", "/no/such/folder/x"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_that_names_the_remedy(arguments, words, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["headrace", "emulate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("headrace: ")
    assert words in last


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(3)", 2)], ids=["done", "failed"])
def test_a_server_that_ends_before_the_edge(ending, code):
    """With success, the edge goes on to its own end; with an error, that is the error."""
    with emulate("--emulator", "proxy", edge_s=1.5, serve=f"{SERVE.replace('c.recv(1)', ending)}") as process:
        out, err = process.communicate(timeout=60)
    assert out == "connected\n"
    assert process.returncode == code, err
    assert ("the server ended with code 3 while the edge was running" in err) == (code == 2)


def test_a_server_elsewhere_is_told_where_to_listen():
    elsewhere = SERVE.replace("sys.argv[1]", "'127.0.0.1'")
    need("tun")
    with emulate("--emulator", "tun", "--server-wait", "1", serve=elsewhere) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "only on 127.0.0.1; does its command say `--host {host} --port {port}`?" in err
    assert left_behind(process.pid) == []


def test_without_root_the_proxy_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    emulator, why = emulators.choose()
    assert emulator == "proxy"
    assert "not netem nor tun" in why
    assert "root" in why or "thing of Linux" in why
    with pytest.raises(LinkError, match="Here works: proxy"):
        emulators.choose("tun")
    with pytest.raises(LinkError, match="root"):
        Namespaces()


def test_the_doctor_says_which_emulator_there_is():
    (finding,) = [each for each in examine_machine() if each.what.startswith("emulated links")]
    emulator, _ = emulators.choose()
    assert emulators.KINDS[emulator] in finding.what
    assert finding.level == ("note" if emulator == "proxy" else "ok")
    for verdict in emulators.probe():
        assert verdict.why_not in finding.remedy


async def test_settings_reach_both_ends_and_no_other():
    need("tun")
    outside = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text()
    other = namespaces.congestion_controls()[0][-1]
    link = await TunRelayLink.open(LinkSpec(), 5000, congestion=other, slow_start_after_idle=False)
    try:
        for end in ("edge", "server"):
            read = {
                name: await asyncio.to_thread(link.spaces.within, end, Path(f"/proc/sys/net/ipv4/{name}").read_text)
                for name in ("tcp_slow_start_after_idle", "tcp_congestion_control")
            }
            assert read == {"tcp_slow_start_after_idle": "0\n", "tcp_congestion_control": f"{other}\n"}
    finally:
        await link.close()
    assert Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text() == outside
    with pytest.raises(LinkError, match="no TCP congestion control 'pigeon'"):
        Namespaces(congestion="pigeon")


async def test_a_link_that_cannot_be_made_leaves_nothing(monkeypatch):
    need("tun")
    monkeypatch.setattr("headrace.bench.links.tun_relay.TUN", Path("/dev/null"))
    with pytest.raises(LinkError, match="no TUN device"):
        await TunRelayLink.open(LinkSpec(), 5000)
    assert left_behind(os.getpid()) == []


async def test_a_relay_that_dies_is_told_and_leaves_nothing():
    need("tun")
    link = await TunRelayLink.open(LinkSpec(), 5000)
    os.kill(link._process.pid, signal.SIGKILL)
    await link._process.wait()
    with pytest.raises(LinkError, match="relay ended with code -9"):
        await link.close()
    assert left_behind(os.getpid()) == []

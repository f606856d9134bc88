"""Commands that measure the runtime, and what helps to set it up: `headrace bench`, `emulate`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..edge.config import EdgeSettings
from ..models.command_line import COMMITTED, BundleFolder, JsonFile

app = typer.Typer()
bench_app = typer.Typer(no_args_is_help=True, help="Programs that measure the runtime, and the demo.")
app.add_typer(bench_app, name="bench")

Traces = Annotated[Path, typer.Option(help="Folder of recorded links, subfolders included.")]
Jobs = Annotated[int, typer.Option(help="Processes.")]


@app.command()
def doctor(
    server: Annotated[str, typer.Option(help="Address of a server to try, host:port.")] = "",
    config: Annotated[Path | None, typer.Option(help="The edge's TOML file: how it reaches that server.")] = None,
) -> None:
    """Say what is missing or misconfigured on this machine, and what to do about it."""
    from ..edge.access import Access
    from .doctor import examine

    # TLS and token as `headrace edge` would have them, from the file and the environment.
    settings = EdgeSettings.load(config, **({"server": server} if server else {}))
    raise typer.Exit(examine(settings.server if server or config else "", access=Access.of(settings)))


@app.command()
def emulate(
    trace: Annotated[Path | None, typer.Option(help="Recorded link, replayed both ways.")] = None,
    up_trace: Annotated[Path | None, typer.Option(help="Recorded link from edge to server.")] = None,
    down_trace: Annotated[Path | None, typer.Option(help="Recorded link from server to edge.")] = None,
    trace_format: Annotated[
        str, typer.Option(help="mahimahi, seconds-mbit or ms-kbit; by default told by the number of columns.")
    ] = "",
    up_mbps: Annotated[float | None, typer.Option(help="Constant rate up, Mbit/s.")] = None,
    down_mbps: Annotated[float | None, typer.Option(help="Constant rate down; by default no limit.")] = None,
    phases: Annotated[str, typer.Option(help="Steps up, MBITS:SECONDS,...: 8:10,0:4,2:10 has an outage.")] = "",
    delay_ms: Annotated[float, typer.Option(help="Propagation one way, each way.")] = 0.0,
    jitter_ms: Annotated[float, typer.Option(help="Further delay of each packet, 0 to this.")] = 0.0,
    loss: Annotated[float, typer.Option(help="Probability that a packet is lost, each way: 0.01 is 1 %.")] = 0.0,
    queue_bytes: Annotated[
        int, typer.Option(help="Most bytes that wait at the bottleneck, each way; rate / 8 is a bufferbloat of 1 s.")
    ] = 64 * 1024,
    seed: Annotated[int, typer.Option(help="Of losses and jitter.")] = 0,
    server: Annotated[
        str, typer.Option(help="Server command; {host} and {port} say where it is to listen.", metavar="COMMAND")
    ] = "",
    edge: Annotated[
        str, typer.Option(help="Edge command; {server} is the HOST:PORT to connect to.", metavar="COMMAND")
    ] = "",
    port: Annotated[int, typer.Option(help="Where the server listens; 0: 50051, or any free one on loopback.")] = 0,
    emulator: Annotated[
        str, typer.Option(help="netem, tun (both as root) or proxy; auto: the first of them that works here.")
    ] = "auto",
    congestion: Annotated[str, typer.Option(help="TCP's congestion control at both ends: reno, cubic, bbr.")] = "reno",
    slow_start_after_idle: Annotated[
        bool, typer.Option(help="TCP forgets its congestion window in a pause (the kernel's default).")
    ] = True,
    server_wait: Annotated[float, typer.Option(help="Seconds that the server may take until it listens.")] = 120.0,
    listen: Annotated[str, typer.Option(help="Instead of commands: HOST:PORT of a proxy; port 0 is any.")] = "",
    to: Annotated[str, typer.Option(help="HOST:PORT of the server behind that proxy.")] = "",
    json: JsonFile = None,
) -> None:
    """Put any edge and server behind an emulated or recorded link.

    headrace emulate --up-trace verizon.up --delay-ms 20 --loss 0.01
    --server "headrace serve --host {host} --port {port} --insecure"
    --edge "headrace edge --server {server} --source video.mp4"

    As root, TCP itself meets the link's losses and queue, in network namespaces that are removed in the end. Without
    root a proxy on loopback stands in, which shows rate, delay and outages.
    """
    from .links.emulate import Pair, run
    from .links.emulate_spec import LinkFlags

    flags = LinkFlags(
        trace=trace,
        up_trace=up_trace,
        down_trace=down_trace,
        up_mbps=up_mbps,
        down_mbps=down_mbps,
        phases=phases,
        trace_format=trace_format,
        delay_ms=delay_ms,
        jitter_ms=jitter_ms,
        loss=loss,
        queue_bytes=queue_bytes,
        seed=seed,
    )
    pair = (
        Pair(server, edge, port, emulator, congestion, slow_start_after_idle, server_wait) if server or edge else None
    )
    raise typer.Exit(run(flags.spec(), pair=pair, listen=listen, to=to, json_file=json))


@bench_app.command("overhead")
def bench_overhead(
    frames: Annotated[int, typer.Option(help="Frames to send, one in flight.")] = 300,
    json: JsonFile = None,
) -> None:
    """What the runtime adds to compute on loopback: end-to-end time less head, coding, decoding and tail."""
    from .overhead import run

    raise typer.Exit(run(frames, json))


@bench_app.command("switch")
def bench_switch(
    bundle: BundleFolder = COMMITTED,
    rounds: Annotated[int, typer.Option(help="Times that every operating point is changed to.")] = 25,
    json: JsonFile = None,
) -> None:
    """What changing the operating point between two frames costs the device: time beyond a frame's own, and memory."""
    from .switch import run

    raise typer.Exit(run(bundle, rounds, json))


@bench_app.command("server")
def bench_server(
    devices: Annotated[int, typer.Option(help="Emulated devices, each with a connection of its own.")] = 32,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 3.0,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, every system has its turn.")] = 3,
    deadline_ms: Annotated[
        float, typer.Option(help="Deadline of a frame; also the bound of the 99th percentile.")
    ] = 250.0,
    batch: Annotated[int, typer.Option(help="Most frames in a batch, for every system.")] = 8,
    pattern: Annotated[str, typer.Option(help="When a device's frames are due: poisson or periodic.")] = "poisson",
    rivals: Annotated[str, typer.Option(help="Compare with these; empty for none.")] = "litserve,ray",
    overload_s: Annotated[float, typer.Option(help="Seconds of ten times the capacity; 0 leaves it out.")] = 60.0,
    idle: Annotated[int, typer.Option(help="Idle devices; 0 leaves them out.")] = 500,
    repetitions: Annotated[int, typer.Option(help="Drains and swaps under load; 0 leaves them out.")] = 20,
    point: Annotated[
        str, typer.Option(help="Operating point of the packets: a feature point of the shipped bundle.")
    ] = "blocks.2.0@3",
    parts: Annotated[
        str, typer.Option(help="What to measure: some of compare, bare, overload, heed, greed, idle, drain, swap.")
    ] = "compare,bare,overload,heed,greed,idle,drain,swap",
    keep: Annotated[
        Path | None, typer.Option(help="File that keeps figures and rounds; a run goes on with what is in it.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """The server under load, beside a bare loop, LitServe and plain Ray Serve with the same tail.

    The server has one core, the load another. Devices speak the real stream and send when it is time, whatever has
    become of the frames before. What a system carries is the goodput at the largest load at which 99 % of the frames
    are answered within the deadline.
    """
    from .server.plan import Plan
    from .server.run import run

    plan = Plan.of(
        devices,
        seconds,
        rounds,
        deadline_ms,
        batch,
        pattern,
        rivals,
        overload_s,
        idle,
        repetitions,
        point,
        parts,
        keep,
    )
    raise typer.Exit(run(plan, json))


@bench_app.command("fleet")
def bench_fleet(
    traces: Traces,
    devices: Annotated[int, typer.Option(help="Devices to simulate.")] = 100_000,
    fps: Annotated[float, typer.Option(help="Frames a second of each.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Seconds of the fleet's life.")] = 6.0,
    deadline_ms: Annotated[float, typer.Option(help="Deadline of a frame.")] = 250.0,
    devices_ms: Annotated[
        str, typer.Option(help="Kinds of devices, by the ms that the uncut model takes.")
    ] = "300,500",
    seed: Annotated[int, typer.Option(help="Of links, sizes, compute times and phases.")] = 0,
    jobs: Jobs = 1,
    constants: Annotated[
        Path | None,
        typer.Option(help="What --json of an earlier run wrote: take its constants and measure none."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """What a fleet needs: a capacity model with constants measured here, checked by a simulation in virtual time.

    The simulation runs the real control loop of every device over a recorded link, and the real admission and batching
    of every server. 100,000 devices take tens of minutes on one core.
    """
    from .fleet.run import Plan, read_constants, run

    known = read_constants(constants) if constants is not None else None
    raise typer.Exit(run(Plan.of(traces, devices, fps, seconds, deadline_ms, devices_ms, seed, jobs), json, known))


@bench_app.command("backbones")
def bench_backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Backbones to try; none for the whole table.")] = None,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
) -> None:
    """Cut every architecture that this field compares itself on, send one frame through each, and write a table."""
    from .backbones import run

    raise typer.Exit(run(names or (), output))


@bench_app.command("demo")
def bench_demo(
    output: Annotated[Path, typer.Option(help="Folder for the summary, the timeline and the frames.")] = Path(
        "demo-output"
    ),
    kill_server_at: Annotated[
        float, typer.Option(help="Kill the server after this many seconds and start it again; 0: never.")
    ] = 0.0,
) -> None:
    """A real video over a narrowing emulated link, live, with references on the same link."""
    from .demo.run import run

    raise typer.Exit(run(output, kill_server_at=kill_server_at))


@bench_app.command("control")
def bench_control(
    traces: Traces,
    bundle: BundleFolder = COMMITTED,
    deadlines_ms: Annotated[str, typer.Option(help="Deadlines in ms.")] = "100,200,400",
    devices_ms: Annotated[str, typer.Option(help="Devices, by the ms that the uncut model takes.")] = "150,500",
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 10.0,
    seconds: Annotated[float, typer.Option(help="Length of a window.")] = 60.0,
    windows: Annotated[int, typer.Option(help="Windows of each trace, spread over it; 0 for all.")] = 1,
    every: Annotated[int, typer.Option(help="Only every so-manieth window.")] = 1,
    below_mbps: Annotated[float, typer.Option(help="Only windows with a mean rate under this.")] = 5.0,
    rtt_ms: Annotated[float, typer.Option(help="Round trip of propagation.")] = 30.0,
    server_ms: Annotated[float, typer.Option(help="The server's service time.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of packet sizes and compute times.")] = 0,
    jobs: Jobs = 1,
    real: Annotated[
        int, typer.Option(help="Run so many cells, evenly spread, with real processes over an emulated link, too.")
    ] = 0,
    emulator: Annotated[str, typer.Option(help="Of that link: auto, netem, tun or proxy.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the cells that are in the output folder.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for control.csv and control.png.")] = Path("control-output"),
    json: JsonFile = None,
) -> None:
    """The control loop on recorded links in virtual time, beside the offline optimum and seven other policies."""
    from .control.run import Plan, run

    plan = Plan.of(
        bundle,
        traces,
        deadlines_ms,
        devices_ms,
        fps,
        seconds,
        windows,
        every,
        below_mbps,
        rtt_ms,
        server_ms,
        seed,
        jobs,
        real,
        emulator,
        resume,
    )
    raise typer.Exit(run(plan, output, json))

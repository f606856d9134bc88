"""Tails in ONNX Runtime: on a CPU it takes 0.4 to 0.8 of the time of eager PyTorch for the same network.

    module ──trace──► ONNX graph ──► session, proved against the module on two batches ──► called in the module's place

Activations are one operation with the convolution before them, maps are kept in blocks of channels, and nothing is done
in Python between two layers. What is not proved, or cannot be written as a graph at all, stays what it was.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
import structlog
import torch
from torch import Tensor, nn

log = structlog.get_logger(__name__)

Network: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""Tensors -> outputs, the batch first in each."""
Examples: TypeAlias = Callable[[int], tuple[Tensor, ...]]
"""A batch of so many frames, as a network takes it."""
Lower: TypeAlias = Callable[[str, nn.Module, Examples], Network]
"""What makes a network of a module, which it need not keep: a name for the log, the module, what it takes."""

NEAR = 1e-4
"""Most that outputs may differ from the module's, relative to its largest."""
TRACED_BATCH = 2
"""Frames of the batch that the graph is made from; those of the proof have other sizes."""
PROOF_BATCHES = (1, 3)


def as_it_is(_: str, module: nn.Module, __: Examples) -> Network:
    """The module itself, in PyTorch."""
    network: Network = module
    return network


def onnx_runtime(threads: int) -> Lower:
    """What makes networks that ONNX Runtime runs on the CPU; a module that it cannot take stays as it is.

    Args:
        threads: of each network; 0 for one a core.
    """
    return partial(_lowered, threads or len(os.sched_getaffinity(0)))


class OnnxNetwork:
    """A session that is called like the module which it was made from."""

    def __init__(self, module: nn.Module, example: tuple[Tensor, ...], outputs: int, threads: int) -> None:
        """Trace the module, which gives so many outputs, on a batch; later batches may have any number of frames.

        Raises:
            Exception: it cannot be traced, written, or read. Neither side's errors share a base.
        """
        self._inputs = [f"input-{i}" for i in range(len(example))]
        names = [f"output-{i}" for i in range(outputs)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that spin while they wait take cores from decoding and from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # An arena of its own for every tail would hold as much memory again as all weights; pictures in large batches
        # (the uncut model's) take a third longer without, and most tails do not.
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        # By way of a file: from memory the weights would be there several times, and leave gaps.
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            path = Path(folder) / "tail.onnx"
            _write(module, example, self._inputs, names, path)
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs of a batch on the CPU."""
        feed = {name: tensor.numpy() for name, tensor in zip(self._inputs, tensors, strict=True)}
        return tuple(torch.from_numpy(output) for output in self._session.run(None, feed))


def _write(module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str], path: Path) -> None:
    """Write an ONNX file by tracing. PyTorch's newer exporter takes twenty times as long, for the same graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            path,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs)},
            dynamo=False,
        )


def _lowered(threads: int, name: str, module: nn.Module, examples: Examples) -> Network:
    batches = [examples(size) for size in PROOF_BATCHES]
    try:
        with torch.inference_mode():
            expected = [module(*batch) for batch in batches]
        network = OnnxNetwork(module, examples(TRACED_BATCH), len(expected[0]), threads)
        off = max(_difference(network(*batch), theirs) for batch, theirs in zip(batches, expected, strict=True))
    except Exception as error:
        log.warning("a tail stays with PyTorch", tail=name, why=repr(error)[:300])
        return as_it_is(name, module, examples)
    if not off <= NEAR:
        log.warning("a tail stays with PyTorch", tail=name, why=f"ONNX Runtime's outputs are {off:.1e} from its own")
        return as_it_is(name, module, examples)
    return network


def _difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """How far outputs are from the module's, relative to its largest; infinity where shapes differ."""
    found = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            return math.inf
        if other.numel():
            apart, largest = (mine.double() - other.double()).abs().max(), other.double().abs().max()
            found = max(found, float(apart) / max(float(largest), torch.finfo(torch.float32).tiny))
    return found


def give_memory_back() -> None:
    """Return to the system what making the networks took and left in gaps; does nothing where libc is not glibc's."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

"""ONNX Runtime on the CPU, all graphs of a process computing in the same memory.

By itself every session has an arena of its own. A device has a dozen graphs and runs one at a time: what the one before
left in the caches and in the tables of pages is of no use to the next one if that computes elsewhere, and each arena
stays as large as its graph ever needed. So they share one, and its first extent is large enough for all: an arena gives
the smallest free piece that suffices, and only where there is one piece do all graphs begin at the same place. Of an
extent only those pages take memory that were ever written.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnxruntime

EXTENT_BYTES = 64 * 2**20
"""Twice what YOLOv2-tiny takes at 416 x 416 pixels. A graph that takes more gets an extent of its own."""


def open_session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        path: an ONNX file.
        threads: that compute an operation together.

    Raises:
        Exception: it cannot be loaded. ONNX Runtime's own exceptions share no base but this.
    """
    _share_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin while they wait would take the one core from everything else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@cache
def _share_memory() -> None:
    """Make the arena, once a process."""
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    how = onnxruntime.OrtArenaCfg(
        {
            "max_mem": 0,
            "arena_extend_strategy": 0,
            "initial_chunk_size_bytes": EXTENT_BYTES,
            "max_dead_bytes_per_chunk": -1,
        }
    )
    onnxruntime.create_and_register_allocator(where, how)

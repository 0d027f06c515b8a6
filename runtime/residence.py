"""Weights that stay in memory: a mapping of the file that the system is told to keep (`mlock`).

Weights are mapped from the bundle, so the system may drop pages that no token has touched for a while and read them
from disk again. On a device with memory to spare, or where the pace must not break, they are locked: read once, kept
until the engine is closed, still shared with other processes that map the same file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError


class LockedFile:
    """A file whose pages stay in memory until `close`."""

    def __init__(self, path: Path) -> None:
        """Read and lock it.

        Raises:
            EngineError: the system has no such call, or allows too little of it.
        """
        self._map: mmap.mmap | None = None
        lock = _find_lock()
        if lock is None:
            raise EngineError("this system cannot lock weights in memory (no mlock); load without lock_weights")
        size = path.stat().st_size
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        address = np.frombuffer(mapped, np.uint8).ctypes.data  # ctypes itself takes no read-only buffer
        if lock(ctypes.c_void_p(address), ctypes.c_size_t(size)) != 0:
            code = ctypes.get_errno()
            mapped.close()
            raise EngineError(
                f"cannot lock {size / 2**20:,.0f} MiB of weights in memory ({os.strerror(code)}; {_limit()}); raise "
                "the limit (ulimit -l unlimited), or load without lock_weights"
            )
        self._map = mapped

    def close(self) -> None:
        """Let the system drop the pages again; a second time does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None


def _find_lock() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).mlock
    except (AttributeError, OSError, TypeError):
        return None


def _limit() -> str:
    try:
        import resource
    except ImportError:
        return "no limit known"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "no limit set" if soft == resource.RLIM_INFINITY else f"the limit is {soft / 2**20:,.0f} MiB"

"""Bounds of memory in tests: this process, which has loaded all that tests need, counts as nothing beside builders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moedge.export import memory
from moedge.profiles.targets import _trt_parts
from moedge.runtime import machine


@contextmanager
def small_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "resident_bytes", lambda: 0)
        patch.setattr(_trt_parts, "CALLER_BYTES", 0)
        patch.setattr(machine, "reset_peak_memory", lambda: False)
        yield

"""Weights locked in memory: the same answers, let go at the end, and what is said where the system refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moedge
from moedge.errors import EngineError
from moedge.runtime import residence

STATUS = Path("/proc/self/status")


def locked_kib() -> int:
    found = re.search(r"VmLck:\s*(\d+)", STATUS.read_text())
    assert found is not None
    return int(found.group(1))


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_locked_while_the_engine_is_open(tiny_bundle: Path) -> None:
    before = locked_kib()
    with moedge.load(tiny_bundle, threads=1) as plain:
        expected = plain.logits([1, 5, 9])
        assert locked_kib() == before
    with moedge.load(tiny_bundle, threads=1, lock_weights=True) as engine:
        assert (locked_kib() - before) * 1024 >= (tiny_bundle / "weights.bin").stat().st_size
        np.testing.assert_array_equal(engine.logits([1, 5, 9]), expected)
    assert locked_kib() == before


def test_what_is_said_where_it_cannot_be(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (tiny_bundle / "weights.bin").stat().st_size
    monkeypatch.setattr(residence, "_find_lock", lambda: lambda address, size: -1)
    monkeypatch.setattr(residence.ctypes, "get_errno", lambda: 12)
    monkeypatch.setattr(residence, "_limit", lambda: "the limit is 8 MiB")
    with pytest.raises(EngineError) as raised:
        moedge.load(tiny_bundle, threads=1, lock_weights=True)
    assert str(raised.value) == (
        f"cannot lock {size / 2**20:,.0f} MiB of weights in memory (Cannot allocate memory; the limit is 8 MiB); raise "
        "the limit (ulimit -l unlimited), or load without lock_weights"
    )
    monkeypatch.undo()
    monkeypatch.setattr(residence, "_find_lock", lambda: None)
    with pytest.raises(EngineError, match="^this system cannot lock weights in memory .no mlock.; load without lock_w"):
        moedge.load(tiny_bundle, threads=1, lock_weights=True)


def test_nothing_is_written_into_the_users_home(tiny_bundle: Path, tmp_path: Path) -> None:
    """onnxruntime by itself keeps files about its use there."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    command = [sys.executable, "-m", "moedge", "generate", str(tiny_bundle), "-p", "a", "-n", "2", "--threads", "1"]
    subprocess.run(command, env=environment | {"HOME": str(home)}, check=True, capture_output=True)
    assert not [path for path in home.rglob("*") if path.is_file()]

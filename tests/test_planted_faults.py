"""Faults planted in what the writer writes, for every way that integers come about: each is found by name."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_model
from packed_checkpoints import convert_checkpoint
from test_quantized_checkpoints import INTEGER_FORMATS

import moedge
from moedge.export import digests, parity, quantization, writer
from moedge.export.layout import Stored

MLP = "model.layers.{}.mlp"
TEXT = "the quick brown fox jumps over the lazy dog. " * 60
# What is planted: the checkpoint's tensors that must be named for it.
FAULTS = {
    "experts 3 and 6 swapped": [f"{MLP.format(2)}.experts.{expert}.down_proj" for expert in (3, 6)],
    "gate and up exchanged": [f"{MLP.format(1)}.experts.2.{part}_proj" for part in ("gate", "up")],
    "a row of scales shifted": [f"{MLP.format(0)}.down_proj"],
    "one scale a little off": ["model.layers.1.self_attn.o_proj"],
}


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tamper with the last thing that stands between the quantizer and the file."""
    real = writer._write_quantized

    def tampered(stream: Any, stored: Stored, start: int, quantized: quantization.Quantized) -> None:
        rows, name = stored.weight.unit_shape[0], stored.weight.name
        if name == "layers.2.experts.down.weight":
            start = {3: 6 * rows, 6: 3 * rows}.get(start // rows, start)
        elif name == "layers.1.experts.gate_up.weight" and start // rows == 2:
            for values in (quantized.codes, quantized.scales, quantized.zero_points):
                if values is not None:
                    values[:] = values.reshape(-1, 2, values.shape[1])[:, ::-1].reshape(values.shape)
        elif name == "layers.0.mlp.down.weight":
            quantized.scales[5] = np.roll(quantized.scales[5], 1)
        elif name == "layers.1.attn.o.weight":
            # The scales that a byte holds are up to a sixteenth apart.
            quantized.scales[7, 1] *= np.float32(1.07 if quantized.bits == 4 else 1.001)
        real(stream, stored, start, quantized)

    monkeypatch.setattr(writer, "_write_quantized", tampered)


def find_all(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, **options: Any) -> list[str]:
    """Every fault that an export finds; it must fail, by the first of them, and leave nothing."""
    found: list[str] = []
    real = parity.find_weight_faults

    def listed(*arguments: Any) -> list[str]:
        found.extend(real(*arguments))
        return found

    monkeypatch.setattr(parity, "find_weight_faults", listed)
    with pytest.raises(moedge.ParityError) as caught:
        moedge.export(source, tmp_path / "bundle", group_size=16, **options)
    assert f"{len(found)} tensors differ from the checkpoint, first: {found[0]}" in str(caught.value)
    assert not os.path.exists(tmp_path / "bundle")
    return found


def check_named(found: list[str]) -> None:
    names = [fault.split(" ")[0].removesuffix(".weight").removesuffix(".qweight") for fault in found]
    names = [name.removesuffix(".weight_packed") for name in names]
    assert sorted(names) == sorted(itertools.chain(*FAULTS.values()))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "gptq"])
def test_each_fault_is_named_whatever_quantized(
    algorithm: str,
    weights: str,
    zero_points: bool,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "weights": weights, "zero_points": zero_points}
    if algorithm == "gptq":
        (tmp_path / "text.txt").write_text(TEXT)
        options["calibration"] = tmp_path / "text.txt"
    plant(monkeypatch)
    found = find_all(monkeypatch, tiny_checkpoint, tmp_path, **options)
    check_named(found)
    subtle = next(fault for fault in found if "o_proj" in fault)
    assert subtle.endswith("(as layers.1.attn.o.weight): what was written is not what the quantizer gave")


@pytest.mark.parametrize("name", ["gptq 4 sym", "gptq 4 asym", "gptq 8 asym", "awq", "ct w4 asym", "ct w8 asym"])
def test_each_fault_is_named_in_integers_that_came(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, settings = INTEGER_FORMATS[name]
    convert_checkpoint(make_model(7), tmp_path / "c", convert, settings)
    plant(monkeypatch)
    found = find_all(monkeypatch, tmp_path / "c", tmp_path)
    check_named(found)
    assert all("values differ" in fault for fault in found)


def test_a_fault_before_the_quantizer_is_named_where_rounding_would_hide_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert that is nearly like another, as upcycled ones are: the wrong one was quantized."""
    real = writer.read_parts

    def nudged(checkpoint: Any, stored: Stored, *rest: Any) -> Any:
        for part in real(checkpoint, stored, *rest):
            if stored.weight.name == "layers.1.experts.down.weight" and part.start == 2 * 64:
                part = writer.Part(part.start, part.stop, part.values * np.float32(1.0001))
            yield part

    monkeypatch.setattr(writer, "read_parts", nudged)
    (fault,) = find_all(monkeypatch, tiny_checkpoint, tmp_path, weights="int8")
    assert fault == (
        "model.layers.1.mlp.experts.2.down_proj.weight (as layers.1.experts.down.weight): other values than these were "
        "quantized"
    )


def test_a_digest_tells_places_and_the_last_bit() -> None:
    values = np.random.default_rng(5).normal(size=(8, 64)).astype(np.float32)
    changed = {digests.digest(values), digests.digest(values[::-1]), digests.digest(values[:, ::-1])}
    for row in range(8):
        other = values.copy()
        other[row, 3] = np.nextafter(other[row, 3], np.float32(9))
        changed.add(digests.digest(other))
    coarse = values.view(np.uint32) & np.uint32(0xFFFF0000)  # what bfloat16 holds
    for row in range(7):
        coarse[[row, row + 1]] = coarse[[row + 1, row]]
        changed.add(digests.digest(coarse.view(np.float32)))
    assert len(changed) == 3 + 8 + 7

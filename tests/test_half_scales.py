"""Scales in half precision: which matrices have them, and that everything which reads them takes them as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import Stack, experts_model, linear_model, make_model, make_stack, open_model
from onnx import TensorProto

from moedge.runtime import kernels

Array = np.ndarray[Any, Any]


# The kernels


def halved(generator: np.random.Generator, stack: Stack) -> Stack:
    """The stack with scales in half precision, some negative or subnormal."""
    scales = stack.scales.astype(np.float16)
    odd = generator.integers(0, 1 << 16, scales.shape, np.uint16) & np.uint16(0x83FF)
    scales = np.where(generator.random(scales.shape) < 0.1, odd.view(np.float16), scales)
    return dataclasses.replace(stack, scales=scales)


def widened(stack: Stack) -> Stack:
    return dataclasses.replace(stack, scales=stack.scales.astype(np.float32))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("rows", "width", "group"), [(7, 64, 16), (100, 1088, 64), (75, 1536, 128), (640, 2304, 128)])
def test_scales_in_half_precision_give_the_bits_of_the_same_in_float(
    rows: int, width: int, group: int, bits: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set, for any number of rows; ends that fill no vector of scales."""
    generator = np.random.default_rng(rows + bits)
    matrix = halved(generator, make_stack(generator, (1, rows, width), group, bits, zero_points=bits != 6))
    x = generator.standard_normal((70, width), np.float32)
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        half, whole = (open_model(linear_model(each), library, threads=2) for each in (matrix, widened(matrix)))
        for count in (1, 2, 7, 70):
            (found,), (wanted,) = (session.run(None, {"x": x[:count]}) for session in (half, whole))
            assert np.abs(wanted).max() > 0
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_experts_take_either_kind_of_scales_for_either_matrix(which: tuple[bool, bool], library: Path) -> None:
    generator = np.random.default_rng(3)
    both = [
        halved(generator, make_stack(generator, shape, 32, 4, zero_points=True)) for shape in ((5, 128, 96), (5, 96, 64))
    ]
    given = {
        "x": generator.standard_normal((9, 96), np.float32),
        "experts": generator.integers(0, 5, (9, 1)),
        "weights": np.ones((9, 1), np.float32),
    }
    some = [each if half else widened(each) for each, half in zip(both, which, strict=True)]
    (wanted,) = open_model(experts_model(*map(widened, both)), library).run(None, given)
    (found,) = open_model(experts_model(*some), library).run(None, given)
    np.testing.assert_array_equal(found, wanted)


def test_scales_of_another_type_are_refused(library: Path) -> None:
    constants: dict[str, Array | None] = {"codes": np.zeros((4, 32), np.uint8), "scales": np.ones((4, 2), np.float64)}
    session = open_model(make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=4), library)
    with pytest.raises(Exception, match="shapes do not fit each other"):
        session.run(None, {"x": np.ones((1, 64), np.float32)})

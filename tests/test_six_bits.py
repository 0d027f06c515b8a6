"""Codes of 6 bits: how they are packed, that the graph's function unpacks them, and the kernels over their planes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_cases import Stack, instruction_sets, linear_model, make_model, make_stack, multiply, open_model, quantize
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.export.functions import DOMAIN, FUNCTIONS
from moedge.export.quantization import pack_int6, slice_int6, split_int6, unpack_int6, widen_int6
from moedge.runtime import kernels

Array = np.ndarray[Any, Any]
BLOCK, BEST = 16, 2048  # rows that have a maximum together, and how many of these are looked for


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 192), (5, 80)])
def test_packing_and_the_graphs_unpacking(rows: int, width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 64, (rows, width), np.uint8)
    upper, lower = pack_int6(codes)
    for row, column in [(0, 0), (rows - 1, width - 1), (rows // 2, 17), (0, 6)]:
        high = upper[row, column // 2] >> 4 * (column % 2) & 15
        low = lower[row, column // 4] >> 2 * (column % 4) & 3
        assert 4 * high + low == codes[row, column]
    assert (upper.shape, lower.shape) == ((rows, width // 2), (rows, width // 4))
    np.testing.assert_array_equal(unpack_int6(upper, lower), codes)
    np.testing.assert_array_equal(widen_int6(upper, lower), codes + 96)
    node = helper.make_node("SixBitPlanes", ["packed"], ["codes"], domain=DOMAIN)
    given = helper.make_tensor_value_info("packed", TensorProto.UINT8, [3, rows, width // 4])
    graph = helper.make_graph([node], "one", [given], [helper.make_tensor_value_info("codes", TensorProto.UINT8, None)])
    function = onnx.parser.parse_function(FUNCTIONS["SixBitPlanes"])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)
    packed = np.concatenate([upper.reshape(-1), lower.reshape(-1)]).reshape(3, rows, -1)
    (found,) = ReferenceEvaluator(model).run(None, {"packed": packed})
    np.testing.assert_array_equal(found, codes + 96)  # the middle, 32, becomes 128
    for first, end in [(0, rows), (rows // 2, rows), (rows - 1, rows)]:
        part = unpack_int6(*split_int6(slice_int6(packed, first, end)))
        np.testing.assert_array_equal(part, codes[first:end])


def begin(x: Array, matrix: Stack) -> Array:
    """[T, rows] by the upper four bits, the lower ones at their mean in rounded integers; with the bias."""
    codes, scales = quantize(x, matrix.group)
    upper = matrix.codes[0].astype(np.int64).reshape(len(matrix.codes[0]), -1, matrix.group) >> 2
    less = (codes.sum(-1) * 61 + 32) >> 6
    total = np.zeros((len(x), len(upper)), np.float32)
    for b in range(upper.shape[1]):
        integers = codes[:, b] @ upper[:, b].T - 8 * less[:, b, None]
        scale = (scales[:, b, None] * np.float32(4)) * matrix.scales[0][None, :, b]
        total = (total + integers * scale.astype(np.float64)).astype(np.float32)
    return total if matrix.bias is None else total + matrix.bias[0]


def choose(begun: Array) -> Array:
    """bool [T, rows]: those not below the 2,048th largest of the blocks' maxima; all, where there are no more blocks.

    What is no number is no maximum, and not chosen.
    """
    chosen = np.ones(begun.shape, bool)
    if -(-begun.shape[1] // BLOCK) > BEST:
        for token, row in enumerate(begun):
            maxima = [np.fmax.reduce(row[at : at + BLOCK], initial=-np.inf) for at in range(0, len(row), BLOCK)]
            chosen[token] = row >= np.sort(maxima)[-BEST]
    return chosen


# Fewer rows than a tile; ends that fill no tile; groups of a part of a vector, of one, of two and of many.
SHAPES = [((1, 7, 64), 16), ((1, 100, 320), 32), ((1, 75, 576), 64), ((1, 101, 1152), 128), ((1, 640, 512), 256)]


@pytest.mark.parametrize(("shape", "group"), [*SHAPES, ((1, 35, 8320), 64), ((1, 20, 1024), 512), ((1, 9, 48), 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_few_blocks_are_those_of_all_six_bits(
    shape: tuple[int, int, int], group: int, seed: int, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits on every instruction set and for any number of rows, and near the sums that numpy makes."""
    generator = np.random.default_rng(seed)
    matrix = make_stack(generator, shape, group, 6, bias=group == 128)
    x = generator.standard_normal((140, shape[2]), np.float32)
    wanted, first = multiply(x, matrix, 0), None
    for name in instruction_sets(library):
        monkeypatch.setenv(kernels.VARIABLE, name)
        session = open_model(linear_model(matrix), library, threads=2)
        for count in (140, 1, 2, 3, 8):
            (found,) = session.run(None, {"x": x[:count]})
            first = found if first is None else first
            np.testing.assert_array_equal(found, first[:count])
            np.testing.assert_allclose(found, wanted[:count], rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("rows", "width", "group"), [(BLOCK * BEST + 1, 64, 16), (40_007, 128, 64), (33_500, 80, 16)])
def test_of_many_rows_the_largest_are_refined(
    rows: int, width: int, group: int, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set, thread and number of tokens the same bits; which rows they are is counted in numpy."""
    generator = np.random.default_rng(rows)
    matrix = make_stack(generator, (1, rows, width), group, 6, bias=group == 64)
    x = generator.standard_normal((9, width), np.float32)
    whole, begun = multiply(x, matrix, 0), begin(x, matrix)
    chosen = choose(begun)
    wanted, first = np.where(chosen, whole, begun), None
    assert 2000 < chosen.sum(1).min() and chosen.sum(1).max() < rows / 2
    near = 1e-5 * np.abs(whole).max()
    assert (np.abs(whole - begun) > near).mean() > 0.9  # what refining changes
    for name in instruction_sets(library):
        monkeypatch.setenv(kernels.VARIABLE, name)
        for threads in (1, 3):
            session = open_model(linear_model(matrix), library, threads)
            for some in (slice(0, 9), slice(2, 3), slice(4, 7)):
                (found,) = session.run(None, {"x": x[some]})
                first = found if first is None else first
                np.testing.assert_array_equal(found, first[some])
    assert first is not None
    np.testing.assert_allclose(first, wanted, rtol=0, atol=near)
    np.testing.assert_array_equal(first.argmax(1), whole.argmax(1))


def test_many_tokens_are_each_refined_by_themselves(library: Path) -> None:
    generator = np.random.default_rng(5)
    matrix = make_stack(generator, (1, 33_000, 32), 16, 6)
    x = generator.standard_normal((130, 32), np.float32)
    session = open_model(linear_model(matrix), library, threads=2)
    (found,) = session.run(None, {"x": x})
    for token in (0, 64, 127, 128, 129):
        np.testing.assert_array_equal(session.run(None, {"x": x[token : token + 1]})[0][0], found[token])


def test_equal_rows_are_refined_alike(library: Path) -> None:
    """All of them, where no block's maximum is above the others', and where some stand out."""
    generator = np.random.default_rng(8)
    matrix = make_stack(generator, (1, 1, 64), 32, 6)
    codes = np.repeat(matrix.codes, 40_000, axis=1)
    alike = Stack(codes, np.repeat(matrix.scales, 40_000, axis=1), 6)
    x = generator.standard_normal((2, 64), np.float32)
    (found,) = open_model(linear_model(alike), library, threads=2).run(None, {"x": x})
    wanted = multiply(x, alike, 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert (found == found[:, :1]).all()
    (zero,) = open_model(linear_model(alike), library, threads=2).run(None, {"x": np.zeros_like(x)})
    np.testing.assert_array_equal(zero, np.zeros_like(zero))
    codes[0, 13_000:13_700] = matrix.codes[0] ^ 32
    (found,) = open_model(linear_model(alike), library, threads=2).run(None, {"x": x})
    chosen = choose(begin(x, alike))
    np.testing.assert_allclose(found[chosen], multiply(x, alike, 0)[chosen], rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_is_no_number_stays_with_its_token(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(9)
    matrix = make_stack(generator, (1, 34_000, 64), 32, 6)
    x = generator.standard_normal((4, 64), np.float32)
    wild = x.copy()
    wild[1, 5], wild[3, 40] = np.nan, np.inf
    odd = Stack(matrix.codes, matrix.scales.copy(), 6)
    odd.scales[0, 100, 0], odd.scales[0, 20_000:20_064, 1] = np.nan, np.nan  # one row, and a whole block
    for name in instruction_sets(library):
        monkeypatch.setenv(kernels.VARIABLE, name)
        session = open_model(linear_model(matrix), library, threads=2)
        (plain,), (found,) = (session.run(None, {"x": each}) for each in (x, wild))
        np.testing.assert_array_equal(found[::2], plain[::2])
        assert np.isnan(found[1::2]).all()
        (found,) = open_model(linear_model(odd), library, threads=2).run(None, {"x": x})
        lost = np.isnan(odd.scales[0]).any(1)
        assert np.isnan(found[:, lost]).all() and np.isfinite(found[:, ~lost]).all()
        begun, whole = begin(x, odd), multiply(x, odd, 0)
        wanted = np.where(choose(begun), whole, begun)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.nanmax(np.abs(whole)))


@pytest.mark.parametrize(
    ("codes", "zeros"),
    [((2, 4, 32), False), ((3, 5, 32), False), ((3, 4, 16), False), ((3, 4, 32), True)],
)
def test_what_the_kernels_cannot_take_is_refused(codes: tuple[int, ...], zeros: bool, library: Path) -> None:
    """Planes, rows or columns that are missing, and zero points."""
    constants = {
        "codes": np.zeros(codes, np.uint8),
        "scales": np.ones((4, 8), np.float32),
        "zeros": np.zeros((4, 8), np.uint8) if zeros else None,
    }
    session = open_model(make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=6), library)
    with pytest.raises(Exception, match="shapes do not fit"):
        session.run(None, {"x": np.ones((1, 128), np.float32)})


def test_codes_in_blocks_are_refused_when_a_graph_is_loaded(library: Path) -> None:
    """As engines of before have them, whose bytes must never be taken for planes."""
    constants = {"codes": np.zeros((4, 96), np.uint8), "scales": np.ones((4, 8), np.float32)}
    with pytest.raises(Exception, match="its 6-bit codes are in blocks, as an earlier version had them"):
        open_model(make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=6), library)

"""Codes of 6 bits: how they are packed, that the graph's function unpacks them, and the kernels over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_cases import Stack, instruction_sets, linear_model, make_model, make_stack, multiply, open_model
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.export.functions import DOMAIN, FUNCTIONS
from moedge.export.quantization import pack_int6, unpack_int6
from moedge.runtime import kernels

Array = np.ndarray[Any, Any]


def bits_of_block(codes: Array) -> list[int]:
    """48 bytes of 64 codes, a bit at a time."""
    block = [0] * 48
    for place, code in enumerate(codes.tolist()):
        block[place % 32] |= (code & 15) << (4 * (place // 32))
        block[32 + place % 16] |= (code >> 4) << (2 * (place // 16))
    return block


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 192), (5, 640)])
def test_packing_and_the_graphs_unpacking(rows: int, width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 64, (rows, width), np.uint8)
    packed = pack_int6(codes)
    wanted = [[byte for at in range(0, width, 64) for byte in bits_of_block(row[at : at + 64])] for row in codes]
    np.testing.assert_array_equal(packed, np.array(wanted, np.uint8))
    np.testing.assert_array_equal(unpack_int6(packed), codes)
    node = helper.make_node("SixBitCodes", ["packed"], ["codes"], domain=DOMAIN)
    given = helper.make_tensor_value_info("packed", TensorProto.UINT8, [rows, width * 3 // 4])
    graph = helper.make_graph([node], "one", [given], [helper.make_tensor_value_info("codes", TensorProto.UINT8, None)])
    function = onnx.parser.parse_function(FUNCTIONS["SixBitCodes"])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)
    (found,) = ReferenceEvaluator(model).run(None, {"packed": packed})
    np.testing.assert_array_equal(found, codes + 96)  # the middle, 32, becomes 128


# Fewer rows than a tile; ends that fill no tile; groups of a part of a block, of one, of two and of many.
SHAPES = [((1, 7, 64), 16), ((1, 100, 320), 32), ((1, 75, 576), 64), ((1, 101, 1152), 128), ((1, 640, 512), 256)]


@pytest.mark.parametrize(("shape", "group"), [*SHAPES, ((1, 35, 8320), 64), ((1, 20, 1024), 512)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernels_give_the_bits_of_the_same_codes_in_eight(
    shape: tuple[int, int, int], group: int, seed: int, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set, for any number of rows, and near the sums that numpy makes."""
    generator = np.random.default_rng(seed)
    matrix = make_stack(generator, shape, group, 6, bias=group == 128)
    wide = Stack(matrix.codes + np.uint8(96), matrix.scales, 8, bias=matrix.bias)
    x = generator.standard_normal((140, shape[2]), np.float32)
    wanted = multiply(x, matrix, 0)
    for name in instruction_sets(library):
        monkeypatch.setenv(kernels.VARIABLE, name)
        session, other = (open_model(linear_model(each), library, threads=2) for each in (matrix, wide))
        for count in (1, 2, 3, 8, 140):
            (found,), (same,) = (each.run(None, {"x": x[:count]}) for each in (session, other))
            np.testing.assert_array_equal(found, same)
            np.testing.assert_allclose(found, wanted[:count], rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("width", "zeros", "told"),
    [(96, False, "shapes do not fit"), (128, True, "shapes do not fit"), (32832, False, "shapes do not fit")],
)
def test_what_the_kernels_cannot_take_is_refused(width: int, zeros: bool, told: str, library: Path) -> None:
    """Rows of broken blocks, zero points, and rows wider than what is held of them."""
    points = np.zeros((4, width // 16), np.uint8) if zeros else None
    constants = {
        "codes": np.zeros((4, width * 3 // 4), np.uint8),
        "scales": np.ones((4, width // 16), np.float32),
        "zeros": points,
    }
    session = open_model(make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=6), library)
    with pytest.raises(Exception, match=told):
        session.run(None, {"x": np.ones((1, width), np.float32)})

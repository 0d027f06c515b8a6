"""Hostile quantized checkpoints: whatever stands in the settings, shapes and dtypes, reading ends in values or in one
CheckpointError. Derandomized, as tests/test_fuzz.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_checkpoints import AWQ_SETTINGS, FP8_SETTINGS, ct_settings, gptq_settings
from test_fuzz import TRIED, anything, fuzz, modest, numbers

from moedge.export.checkpoint import Checkpoint, TensorEntry
from moedge.export.quantization.sources import FORMATS, bind_sources
from moedge.export.weights import Piece, Weight, check_sources, read_piece

EXAMPLES = 200
ROWS, WIDTH = 16, 64
Sound = dict[str, tuple[str, tuple[int, ...]]]
# Every tensor of a matrix a.weight [16, 64] in groups of 16 (of a stack [2, 64, 16] for mxfp4), and the settings.
SOUND: dict[str, tuple[Sound, dict[str, Any]]] = {
    "gptq": (
        {
            "a.qweight": ("int32", (8, 16)),
            "a.qzeros": ("int32", (4, 2)),
            "a.scales": ("float16", (4, 16)),
            "a.g_idx": ("int32", (64,)),
        },
        gptq_settings(4),
    ),
    "awq": (
        {"a.qweight": ("int32", (64, 2)), "a.qzeros": ("int32", (4, 2)), "a.scales": ("float16", (4, 16))},
        AWQ_SETTINGS,
    ),
    "compressed-tensors": (
        {
            "a.weight_packed": ("int32", (16, 8)),
            "a.weight_scale": ("bfloat16", (16, 4)),
            "a.weight_shape": ("int64", (2,)),
            "a.weight_zero_point": ("int32", (2, 4)),
            "a.weight_g_idx": ("int32", (64,)),
        },
        ct_settings("pack-quantized"),
    ),
    "fp8": ({"a.weight": ("float8_e4m3fn", (16, 64)), "a.weight_scale_inv": ("float32", (1, 4))}, FP8_SETTINGS),
    "mxfp4": (
        {"a.weight_blocks": ("uint8", (2, 16, 2, 16)), "a.weight_scales": ("uint8", (2, 16, 2))},
        {"quant_method": "mxfp4"},
    ),
}
DTYPES = ["int32", "int64", "int8", "uint8", "float16", "bfloat16", "float32", "float8_e4m3fn", "bool"]
DATA = 16 << 10
sides = st.one_of(st.integers(0, 5), st.sampled_from([8, 15, 16, 17, 32, 64, 65]))
shapes = st.lists(sides, max_size=4).map(tuple)


@st.composite
def changes(draw: st.DrawFn, method: str) -> tuple[Sound, dict[str, Any], int]:
    """(Tensors with up to three things changed, settings with up to two, the seed of their content)."""
    sound, plain = SOUND[method]
    tensors, config = dict(sound), dict(plain)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(sound)))
        dtype, shape = sound[name]
        change = draw(st.sampled_from(["lost", "dtype", "shape", "side"]))
        if change == "lost":
            tensors.pop(name, None)
        elif change == "dtype":
            tensors[name] = draw(st.sampled_from(DTYPES)), shape
        elif change == "shape":
            tensors[name] = dtype, draw(shapes)
        else:
            place = draw(st.integers(0, len(shape) - 1))
            tensors[name] = dtype, (*shape[:place], draw(sides), *shape[place + 1 :])
    keys = ["bits", "group_size", "format", "config_groups", "weight_block_size", "checkpoint_format", "version", "sym"]
    for key in draw(st.lists(st.sampled_from([*keys, "quant_method", "desc_act"]), max_size=2)):
        config[key] = draw(st.one_of(numbers, anything))
    return tensors, config, draw(st.integers(0, 99))


@pytest.mark.parametrize("method", sorted(FORMATS))
def test_quantized_checkpoints_with_parts_changed(method: str, tmp_path: Path) -> None:
    data = tmp_path / "model.safetensors"
    before = len(TRIED)

    @given(changes(method))
    @settings(fuzz("bytes"), max_examples=EXAMPLES)
    def check(made: tuple[Sound, dict[str, Any], int]) -> None:
        tensors, config, seed = made
        rng = np.random.default_rng(seed)
        content = rng.integers(0, 256 if seed % 2 else 2, DATA, np.uint8)
        data.write_bytes(content.tobytes())
        entries, offset = {}, 0
        for name, (dtype, shape) in tensors.items():
            kind = _dtype(dtype)
            size = int(np.prod(shape)) * kind.itemsize
            if offset + size > DATA:
                return
            entries[name] = TensorEntry(data, kind, shape, offset, size)
            offset += size
        shape = (2, WIDTH, ROWS) if method == "mxfp4" else (ROWS, WIDTH)
        weight = Weight("w", shape, "attention", "linear", ((Piece("a.weight", shape),),))
        with modest():
            checkpoint = Checkpoint(tmp_path, {"quantization_config": config}, entries)
            plan = bind_sources(checkpoint, [weight])
            check_sources(checkpoint, plan)
            ((piece,),) = plan[0].units
            assert np.isfinite(read_piece(checkpoint, piece)).all()
            if piece.integers is not None and piece.packed is not None:
                found = piece.packed.read_codes(checkpoint, 1, 7)
                assert np.isfinite(found.dequantize()).all()

    check()
    assert len(TRIED) - before >= EXAMPLES * 0.9  # all but those that need more data than there is


def _dtype(name: str) -> Any:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))

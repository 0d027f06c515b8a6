"""What is wrong with a quantized checkpoint is said in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_config, make_model
from packed_checkpoints import (
    FP8_SETTINGS,
    convert_checkpoint,
    float8_blocks,
    gptq,
    gptq_settings,
    make_codes,
    read_one,
)

import moedge
from moedge.export.checkpoint import Checkpoint
from moedge.export.quantization.sources import FORMATS
from moedge.export.weights import read_piece

SEED = 20


def broken(tmp_path: Path, change: Callable[[dict[str, Any]], None], **settings: Any) -> str:
    """The error of reading a GPTQ matrix [16, 64] after `change` to its tensors."""
    codes, scales, zeros = make_codes(np.random.default_rng(7).normal(size=(16, 64)), 4, 16, False)
    tensors = gptq("a", codes, scales, zeros, 4)
    change(tensors)
    with pytest.raises(moedge.CheckpointError) as caught:
        piece = read_one(tmp_path / "c", tensors, {**gptq_settings(4), **settings}, "a.weight", (16, 64))
        read_piece(Checkpoint.open(tmp_path / "c"), piece)
    message = str(caught.value).replace(f"{tmp_path / 'c'}: ", "").replace(f"{tmp_path / 'c'}/", "")
    assert "\n" not in message
    return message


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name) and None


def test_what_is_wrong_with_a_packed_tensor_is_named(tmp_path: Path) -> None:
    def lost(tensors: dict[str, Any]) -> None:
        del tensors["a.scales"]

    def nan(tensors: dict[str, Any]) -> None:
        tensors["a.scales"][2, 3] = np.nan

    assert broken(tmp_path, lost) == ("tensor 'a.scales' is missing beside 'a.qweight'; download the checkpoint again")
    assert broken(tmp_path, nan) == "tensor 'a.scales' holds NaN or infinity in row 2; download it again"
    huge = np.full((4, 16), 1e38, np.float32)
    assert broken(tmp_path, put("a.scales", huge)) == (
        "tensor 'a.scales' holds a scale of 1e+38, beyond what weights can have; download it again"
    )
    assert broken(tmp_path, put("a.scales", np.ones((3, 16), np.float16))) == (
        "tensor 'a.qzeros' is int32 [4, 2], a matrix of 64 input and 16 output channels in 4 bits implies int32 "
        "[3, 2]; correct config.json or download the checkpoint again"
    )
    three = {"a.scales": np.ones((3, 16), np.float16), "a.qzeros": np.ones((3, 2), np.int32)}
    assert broken(tmp_path, lambda tensors: tensors.update(three)) == (
        "tensor 'a.scales' has 3 groups of scales, which do not divide 64 input channels; quantize again with a "
        "group size that does"
    )
    assert broken(tmp_path, put("a.qweight", np.ones((6, 16), np.int32))) == (
        "tensor 'a.qweight' packs 64 input channels into 6 words of 32 bits; 4 bits would take 8 and 8 bits 16, "
        "other widths are not supported"
    )
    assert broken(tmp_path, put("a.qweight", np.ones((8, 15), np.int32))) == (
        "tensor 'a.qweight' is int32 [8, 15], a matrix of 64 input and 16 output channels in 4 bits implies int32 "
        "[8, 16]; correct config.json or download the checkpoint again"
    )
    assert broken(tmp_path, put("a.g_idx", np.full(64, 4, np.int32))) == (
        "tensor 'a.g_idx' names groups 4 to 4, there are 4; download the checkpoint again"
    )


def test_what_is_wrong_with_the_settings_is_named(tmp_path: Path) -> None:
    def nothing(tensors: dict[str, Any]) -> None:
        pass

    where = "config.json: quantization_config"
    assert broken(tmp_path, nothing, quant_method="bitsandbytes") == (
        f"{where} has quant_method 'bitsandbytes', which is not known; known: {', '.join(sorted(FORMATS))}; or export "
        "the unquantized checkpoint"
    )
    assert broken(tmp_path, nothing, bits=3) == f"{where}: GPTQ of 3 bits is not read; read are: 4, 8"
    assert broken(tmp_path, nothing, checkpoint_format="marlin") == (
        f"{where}: checkpoint_format 'marlin' is not read; read are: gptq, gptq_v2"
    )
    assert broken(tmp_path, nothing, quant_method="awq", version="gemv") == (
        f"{where}: AWQ version 'gemv' is not read; read are: gemm"
    )
    assert broken(tmp_path, nothing, quant_method="compressed-tensors", format="marlin-24").startswith(
        f"{where}: format 'marlin-24' is not read; read are: pack-quantized, int-quantized, float-quantized"
    )
    assert broken(tmp_path, nothing, quant_method="fp8", weight_block_size=[128]) == (
        f"{where}: weight_block_size is [128], two positive integers were expected"
    )


@pytest.mark.parametrize("method", sorted(FORMATS))
def test_settings_of_any_kind_are_refused_or_read(method: str, tmp_path: Path) -> None:
    """No crash whatever the values: the matrix comes out right, or one line says what is wrong."""
    codes, scales, zeros = make_codes(np.random.default_rng(7).normal(size=(16, 64)), 4, 16, False)
    tensors = gptq("a", codes, scales, zeros, 4)
    keys = ("bits", "checkpoint_format", "version", "weight_block_size", "config_groups", "format", "sparsity_config")
    for key in keys:
        for value in (None, [], {}, "x", -1, 0.5, [[]], {"a": 1}, {"a": {"weights": 3}}, [1, "b"], True):
            settings = {"quant_method": method, "bits": 4, key: value}
            try:
                read_one(tmp_path / "c", tensors, settings, "a.weight", (16, 64))
            except moedge.CheckpointError as error:
                assert "\n" not in str(error)


def test_a_lost_float8_scale_and_a_wrong_one(tmp_path: Path) -> None:
    tensors, _ = float8_blocks("a", np.ones((32, 32), np.float32), 16)
    scales = tensors.pop("a.weight_scale_inv")
    with pytest.raises(moedge.CheckpointError, match=r"'a.weight_scale_inv' is missing beside 'a.weight'; download"):
        read_one(tmp_path / "c", tensors, FP8_SETTINGS, "a.weight", (32, 32))
    tensors["a.weight_scale_inv"] = scales[:1]
    with pytest.raises(moedge.CheckpointError) as caught:
        read_one(tmp_path / "c", tensors, FP8_SETTINGS, "a.weight", (32, 32))
    assert str(caught.value).endswith(
        "tensor 'a.weight_scale_inv' has shape [1, 2] for a matrix [32, 32], blocks of 16x16 imply [2, 2]; correct "
        "config.json or download the checkpoint again"
    )


def test_float8_without_a_quantization_config_is_refused(tmp_path: Path) -> None:
    model = make_model(SEED)
    convert_checkpoint(model, tmp_path / "c", lambda stem, values: float8_blocks(stem, values, 16), FP8_SETTINGS)
    edit_config(tmp_path / "c", quantization_config=None)
    with pytest.raises(moedge.MoedgeError, match=r"tensors of the checkpoint are not used|holds float8"):
        moedge.export(tmp_path / "c", tmp_path / "b")

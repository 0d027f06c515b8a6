"""Quantized checkpoints made from plain ones, each format written from its definition, loops and all.

`CODES` below are uint8 [out, in] with scales and zero points [out, groups]: value = (code - zero point) * scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.torch import load_file, save_file

from moedge.export.checkpoint import Checkpoint
from moedge.export.quantization.sources import bind_sources
from moedge.export.weights import Piece, Weight

Array = np.ndarray[Any, Any]
Tensors = dict[str, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def make_codes(values: Array, bits: int, group: int, symmetric: bool, seed: int = 0) -> tuple[Array, Array, Array]:
    """(codes, scales float16, zero points), with every code and, unless `symmetric`, many zero points in use."""
    rng = np.random.default_rng(seed)
    rows, width = values.shape
    grouped = values.reshape(rows, width // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scales = np.abs(grouped).max(axis=-1) / ((top - 1) / 2) + 1e-4
        zeros = np.full(scales.shape, (top + 1) // 2)
    else:
        scales = (grouped.max(axis=-1) - grouped.min(axis=-1)) / top + 1e-4
        zeros = np.clip(np.rint(-grouped.min(axis=-1) / scales) + rng.integers(-1, 2, scales.shape), 1, top)
    scales = scales.astype(np.float16)
    codes = np.clip(np.rint(grouped / scales[..., None].astype(np.float32)) + zeros[..., None], 0, top)
    return codes.reshape(rows, width).astype(np.uint8), scales, zeros.astype(np.uint8)


def unpack(codes: Array, scales: Array, zeros: Array) -> Array:
    rows, groups = scales.shape
    grouped = codes.reshape(rows, groups, -1).astype(np.float32) - zeros[..., None].astype(np.float32)
    return (grouped * scales[..., None].astype(np.float32)).reshape(codes.shape)


def pack_rows(values: Array, bits: int) -> Array:
    """int32 [n * bits / 32, m] of uint8 [n, m]: down the first axis, lowest bits first, as AutoGPTQ's pack()."""
    each = 32 // bits
    words = np.zeros((-(-len(values) // each), values.shape[1]), np.uint32)
    for row in range(len(values)):
        words[row // each] |= values[row].astype(np.uint32) << np.uint32(bits * (row % each))
    return words.view(np.int32)


def gptq(stem: str, codes: Array, scales: Array, zeros: Array, bits: int, add: int = 1) -> Tensors:
    groups = scales.shape[1]
    width = codes.shape[1]
    return {
        f"{stem}.qweight": pack_rows(codes.T, bits),
        f"{stem}.qzeros": pack_rows(zeros - np.uint8(add) & np.uint8((1 << bits) - 1), bits).T.copy(),
        f"{stem}.scales": scales.T.copy(),
        f"{stem}.g_idx": (np.arange(width) // (width // groups)).astype(np.int32),
    }


def awq_pack(values: Array) -> Array:
    """int32 [n, m / 8] of uint8 [n, m], as AutoAWQ's WQLinear_GEMM.from_linear()."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for nibble in range(8):
            words[:, column] |= values[:, column * 8 + AWQ_ORDER[nibble]].astype(np.uint32) << np.uint32(nibble * 4)
    return words.view(np.int32)


def awq(stem: str, codes: Array, scales: Array, zeros: Array) -> Tensors:
    return {
        f"{stem}.qweight": awq_pack(codes.T),
        f"{stem}.qzeros": awq_pack(zeros.T),
        f"{stem}.scales": scales.T.copy(),
    }


def pack_quantized(stem: str, codes: Array, scales: Array, zeros: Array | None, bits: int) -> Tensors:
    """compressed-tensors: along the input channels; zero points along the output channels."""
    tensors = {
        f"{stem}.weight_packed": pack_rows(codes.T, bits).T.copy(),
        f"{stem}.weight_scale": scales.astype(ml_dtypes.bfloat16),
        f"{stem}.weight_shape": np.array(codes.shape, np.int64),
    }
    if zeros is not None:
        tensors[f"{stem}.weight_zero_point"] = pack_rows(zeros, bits)
    return tensors


def float8_blocks(stem: str, values: Array, block: int) -> tuple[Tensors, Array]:
    """DeepSeek's: (tensors, the values that they stand for)."""
    rows, width = values.shape
    scales = np.zeros((-(-rows // block), -(-width // block)), np.float32)
    codes = np.zeros(values.shape, ml_dtypes.float8_e4m3fn)
    restored = np.zeros_like(values)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
            scales[row, column] = np.abs(values[part]).max() / 448
            codes[part] = (values[part] / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
            restored[part] = codes[part].astype(np.float32) * scales[row, column]
    return {f"{stem}.weight": codes, f"{stem}.weight_scale_inv": scales}, restored


def is_linear(name: str) -> bool:
    """What quantizers take: every projection; not routers, norms, embeddings and head."""
    return name.endswith("_proj.weight") or name.endswith("_with_mqa.weight")


Convert = Callable[[str, Array], tuple[Tensors, Array]]


def convert_checkpoint(
    model: Any,
    folder: Path,
    convert: Convert,
    settings: dict[str, Any],
    skip: tuple[str, ...] = (),
    takes: Callable[[str], bool] = is_linear,
) -> Path:
    """Save `model` with the matrices that `takes` names packed by `convert(stem, values) -> (tensors, values they stand
    for)`, and put those values into the model itself. Names that contain one of `skip` stay as they are."""
    import torch

    model.save_pretrained(folder)
    tensors: Tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    for name in [name for name in tensors if takes(name) and not any(part in name for part in skip)]:
        packed, restored = convert(name.removesuffix(".weight"), tensors.pop(name).float().numpy())
        tensors.update({key: to_torch(value) for key, value in packed.items()})
        with torch.no_grad():
            state[name].copy_(torch.from_numpy(restored.astype(np.float32)))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def to_torch(values: Any) -> Any:
    import torch

    if not isinstance(values, np.ndarray):
        return values
    kinds = {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    if values.dtype.name in kinds:
        plain, kind = kinds[values.dtype.name]
        return torch.from_numpy(np.ascontiguousarray(values).view(plain).copy()).view(kind)
    return torch.from_numpy(np.ascontiguousarray(values).copy())


def gptq_settings(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": False, **more}


AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8_SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def ct_settings(form: str, bits: int = 4, kind: str = "int", strategy: str = "group") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def read_one(folder: Path, tensors: dict[str, Any], settings: dict[str, Any], source: str, shape: Any) -> Piece:
    """A checkpoint of a few tensors, and the piece that stands for `source` in it."""
    folder.mkdir(exist_ok=True)
    save_file({key: to_torch(value).contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    weight = Weight("w", shape, "attention", "linear", ((Piece(source, shape),),))
    ((piece,),) = bind_sources(Checkpoint.open(folder), [weight])[0].units
    return piece

"""Random attention over KV caches: the ops of `moedge.cpu`, and the same in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from kernel_cases import open_model
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moedge.export.quantization import pack_int4, unpack_int4
from moedge.runtime import kernels

Array = NDArray[Any]
Float = NDArray[np.float32]
EPSILON = 1e-3
DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
KINDS = {np.dtype(kind): value for kind, value in (
    (np.float32, TensorProto.FLOAT), (np.float16, TensorProto.FLOAT16), (np.int8, TensorProto.INT8),
    (np.int64, TensorProto.INT64),
)}  # fmt: skip


@dataclass(frozen=True)
class Grouped:
    """n heads over g heads of keys and values of size d; `pairs` of words that are rotated."""

    heads: int
    groups: int
    size: int
    pairs: int
    window: int = 0
    sinks: bool = False
    interleaved: bool = False
    kind: str = "fp32"
    norm: str = ""  # of q and k, before they are rotated: "head" or "row"
    channels: bool = False  # int8 has a scale for each channel, a constant; else one for each row, beside it

    @property
    def room(self) -> int:
        return -(-self.size // 8) * 8

    @property
    def scale(self) -> float:
        return self.size**-0.5


@dataclass(frozen=True)
class Latent:
    """n heads over a latent of `rank` words and a key of `rope`; int8 has `parts` scales a row."""

    heads: int
    nope: int
    rope: int
    rank: int
    value_size: int
    interleaved: bool = True
    kind: str = "fp32"
    parts: int = 1
    group: int = 0  # of k_up and v_up in codes; 0: floats
    zero_points: bool = False
    bits: tuple[int, int] = (8, 8)  # of their codes; below 8 their scales are fp16
    norm: bool = False  # of the latent, which then comes in a row with its rotated key

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


@dataclass
class Run:
    """A run: rows [S, ...] of several lanes, and each lane's caches, which it changes."""

    inputs: dict[str, Array]
    lengths: list[int]
    sizes: list[int]
    caches: list[list[Array]]
    constants: dict[str, Array | None] = field(default_factory=dict)

    def copy(self) -> Run:
        caches = [[cache.copy() for cache in lane] for lane in self.caches]
        return Run(dict(self.inputs), list(self.lengths), list(self.sizes), caches, self.constants)

    def only(self, lane: int, first: int, count: int) -> Run:
        """Rows `first` to `first + count` of one lane, over its own caches."""
        start = sum(self.sizes[:lane]) + first
        rows = {
            name: value[:, start : start + count] if value.ndim == 3 else value[start : start + count]
            for name, value in self.inputs.items()
        }
        return Run(rows, [self.lengths[lane] + first], [count], [self.caches[lane]], self.constants)


def has_row_scales(case: Grouped) -> bool:
    return case.kind == "int8" and not case.channels


def grouped_model(case: Grouped, lanes: int, constants: dict[str, Array | None], sizes: bool = True) -> bytes:
    names = ["q", "k", "v", "cos", "sin"]
    attributes = {"num_heads": case.heads, "num_key_value_heads": case.groups, "head_dim": case.size}
    attributes |= {"scale": case.scale, "interleaved": int(case.interleaved), "window": case.window}
    attributes |= {"epsilon": EPSILON} if case.norm else {}
    kinds = ["keys", "values"] + (["scales.keys", "scales.values"] if has_row_scales(case) else [])
    caches = [f"{kind}.{lane}" for lane in range(lanes) for kind in kinds]
    return _model("GroupedAttention", names, constants, caches, DTYPES[case.kind], sizes, attributes)


def latent_model(case: Latent, lanes: int, constants: dict[str, Array | None], sizes: bool = True) -> bytes:
    names = ["q", *(("kv_a", "norm") if case.norm else ("latent", "k_rope")), "cos", "sin"]
    attributes = {"scale": case.scale, "interleaved": int(case.interleaved), "scaled": int(case.kind == "int8")}
    attributes |= {"epsilon": EPSILON} if case.norm else {}
    kinds = ["rows", "scales"] if case.kind == "int8" else ["rows"]
    caches = [f"{kind}.{lane}" for lane in range(lanes) for kind in kinds]
    return _model("LatentAttention", names, constants, caches, DTYPES[case.kind], sizes, attributes)


def _model(
    op: str,
    names: list[str],
    constants: dict[str, Array | None],
    caches: list[str],
    dtype: Any,
    sizes: bool,
    attributes: dict[str, Any],
) -> bytes:
    before = [name for name in ("k_up", "v_up") if name in constants]
    after = [name for name in constants if name not in (*before, *names)]
    held = [name if constants[name] is not None else "" for name in (*before, "|", *after) if name != "|"]
    places = ["lengths", "sizes" if sizes else ""]
    inputs = [*names, *held[: len(before)], *places, *held[len(before) :], *caches]
    node = helper.make_node(op, inputs, ["y"], domain=kernels.DOMAIN, **attributes)
    rows = [name for name in names if name not in constants]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in rows]
    values += [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in places if name]
    for name in caches:
        kind = TensorProto.FLOAT if name.startswith("scales.") else KINDS[np.dtype(dtype)]
        values.append(helper.make_tensor_value_info(name, kind, None))
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in constants.items()
        if value is not None
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", values, [output], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(kernels.DOMAIN, 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


def run_model(session: ort.InferenceSession, run: Run) -> Float:
    """y, the caches changed where they lie."""
    taken = {value.name for value in session.get_inputs()}
    binding = session.io_binding()
    arrays = {name: np.ascontiguousarray(value) for name, value in run.inputs.items()}
    arrays["lengths"], arrays["sizes"] = np.array(run.lengths, np.int64), np.array(run.sizes, np.int64)
    for lane, caches in enumerate(run.caches):
        grouped = ("keys", "values", "scales.keys", "scales.values")
        kinds = grouped if f"keys.{lane}" in taken else ("rows", "scales")
        arrays |= {f"{kind}.{lane}": cache for kind, cache in zip(kinds, caches, strict=False)}
    for name, array in arrays.items():
        if name in taken:
            assert array.flags.c_contiguous
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding)
    y: Float = binding.get_outputs()[0].numpy()
    return y


def model_of(case: Grouped | Latent) -> Any:
    return grouped_model if isinstance(case, Grouped) else latent_model


def open_case(case: Grouped | Latent, run: Run, library: Path, threads: int = 1) -> ort.InferenceSession:
    return open_model(model_of(case)(case, len(run.caches), run.constants), library, threads)


# --- the same in numpy ----------------------------------------------------------------------------------------------


def rotate(x: Float, cos: Float, sin: Float, interleaved: bool) -> Float:
    """x [S, heads, d], its first words rotated by cos and sin [S, pairs]."""
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    c, s = cos[:, None], sin[:, None]
    real, other = first * c - second * s, first * s + second * c
    both = np.stack([real, other], -1).reshape(turned.shape) if interleaved else np.concatenate([real, other], -1)
    return np.concatenate([both, rest], -1)


def normalize(x: Float, weight: Array | None) -> Float:
    """RMSNorm of parts of rows, as wide as the weight."""
    if weight is None:
        return x
    parts = x.reshape(len(x), -1, len(weight)).astype(np.float64)
    normed = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + EPSILON) * weight
    found: Float = normed.reshape(x.shape).astype(np.float32)
    return found


def attend(q: Float, keys: Array, values: Array, past: int, window: int, scale: float, sinks: Array | None) -> Array:
    """q [S, n, d], keys [T, n, d], values [T, n, v] -> [S, n, v], in float64."""
    scores = np.einsum("snd,tnd->nst", q.astype(np.float64), keys.astype(np.float64)) * scale
    distance = past + np.arange(len(q))[:, None] - np.arange(len(keys))
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (len(sinks), len(q), 1))
        scores = np.concatenate([scores, column], -1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("nst,tnv->snv", shares[..., : len(keys)], values.astype(np.float64))


def mixed_words(size: int) -> int:
    return 1 if size % 16 else size & -size


def mix(x: Array, size: int) -> Array:
    """x [..., size] by Hadamard's matrix, in blocks of `mixed_words`; rows of each sixteen in another order."""
    block = mixed_words(size)
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    mixed: Array = x.reshape(*x.shape[:-1], -1, block) @ matrix
    if block > 1:
        mixed = mixed.reshape(*x.shape[:-1], -1, 4, 4).swapaxes(-1, -2)
    return mixed.reshape(x.shape)


def grouped_reference(case: Grouped, run: Run) -> Array:
    """y [S, n d]; the caches are changed as the op should change them."""
    y, start = [], 0
    for length, size, caches in zip(run.lengths, run.sizes, run.caches, strict=True):
        own = slice(start, start + size)
        start += size
        if size == 0:
            continue
        cos, sin = run.inputs["cos"][0, own], run.inputs["sin"][0, own]
        q, k = (normalize(run.inputs[name][own], run.constants.get(f"{name}_norm")) for name in ("q", "k"))
        q = rotate(q.reshape(size, case.heads, case.size), cos, sin, case.interleaved)
        k = rotate(k.reshape(size, case.groups, case.size), cos, sin, case.interleaved)
        if has_row_scales(case):
            q, k = mix(q, case.size) / mixed_words(case.size), mix(k, case.size)
        v = run.inputs["v"][own].reshape(size, case.groups, case.size)
        known = []
        for index, (rows, name) in enumerate(((k, "key_scales"), (v, "value_scales"))):
            cache, steps = caches[index], run.constants[name]
            by_head = rows.transpose(1, 0, 2)
            scales = np.ones((case.groups, 1, case.room)) if steps is None else steps.reshape(case.groups, 1, -1)
            if has_row_scales(case):
                own_scales = np.maximum(np.abs(by_head).max(-1, keepdims=True) / 127, 1e-30)
                caches[2 + index][0, :, length : length + size] = own_scales
                scales = np.broadcast_to(own_scales, (*by_head.shape[:2], case.room))
            padded = np.zeros((case.groups, size, case.room))
            padded[..., : case.size] = by_head / scales[..., : case.size]
            place = cache[0, :, length : length + size]
            place[:] = np.clip(np.rint(padded), -128, 127) if case.kind == "int8" else padded
            if has_row_scales(case):
                scales = caches[2 + index][0, :, : length + size]
            wide = cache[0, :, : length + size].astype(np.float64) * scales
            known.append(np.repeat(wide[..., : case.size].transpose(1, 0, 2), case.heads // case.groups, axis=1))
        part = attend(q, *known, length, case.window, case.scale, run.constants["sinks"])
        y.append(part.reshape(size, -1))
    rest = np.zeros((len(run.inputs["q"]) - start, case.heads * case.size))
    return np.concatenate([*y, rest])


def rounded(x: Array) -> Array:
    """What is left of [..., group] in int8, a scale a group, in float64."""
    scales = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    found: Array = np.rint(x * (np.float32(1) / scales)) * scales.astype(np.float64)
    return found


def absorb_codes(case: Latent, constants: dict[str, Array | None], q: Float) -> Array:
    """q [S, n, nope] k_up by codes: a group's scales go into the query, which is rounded."""
    scales = constants["k_scales"]
    assert scales is not None
    folded = rounded(q[:, :, None] * scales.swapaxes(1, 2).astype(np.float32))  # [S, n, groups, nope]
    codes, points = unpack_rows(case, constants, "k")
    less = codes.reshape(*scales.shape, -1).astype(np.float64) - points[..., None]
    return np.einsum("sngk,nkgr->sngr", folded, less).reshape(*q.shape[:2], -1)


def expand_codes(case: Latent, constants: dict[str, Array | None], mixed: Array) -> Array:
    """mixed [S, n, rank] v_up by codes, rounded before it."""
    scales = constants["v_scales"]
    assert scales is not None
    parts = rounded(mixed.astype(np.float32).reshape(*mixed.shape[:2], scales.shape[-1], -1))
    return np.einsum("snr,nvr->snv", parts.reshape(mixed.shape), dequantized(case, constants, "v"))


def latent_reference(case: Latent, run: Run) -> Array:
    """y [S, n v]: keys and values expanded from the latent, which the op never does, but for the codes' rounding."""
    y, start = [], 0
    k_up, v_up = (dequantized(case, run.constants, name) for name in ("k", "v"))
    for length, size, caches in zip(run.lengths, run.sizes, run.caches, strict=True):
        own = slice(start, start + size)
        start += size
        if size == 0:
            continue
        cos, sin = run.inputs["cos"][0, own], run.inputs["sin"][0, own]
        q = run.inputs["q"][own].reshape(size, case.heads, case.nope + case.rope)
        q_rope = rotate(q[..., case.nope :], cos, sin, case.interleaved)
        both = run.inputs["kv_a"] if case.norm else np.concatenate([run.inputs["latent"], run.inputs["k_rope"]], -1)
        latent, k_rope = both[own, : case.rank], both[own, case.rank :]
        k_rope = rotate(k_rope[:, None], cos, sin, case.interleaved)[:, 0]
        rows = np.concatenate([normalize(latent, run.constants.get("norm")), k_rope], -1)
        if case.kind == "int8":
            blocks = rows.reshape(size, case.parts, -1)
            scales = np.maximum(np.abs(blocks).max(-1) / 127, 1e-30)
            caches[0][length : length + size] = np.rint(blocks / scales[..., None]).reshape(size, -1)
            caches[1][length : length + size] = scales
            codes = caches[0][: length + size].reshape(length + size, case.parts, -1).astype(np.float64)
            known = (codes * caches[1][: length + size, :, None]).reshape(length + size, -1)
        else:
            caches[0][length : length + size] = rows
            known = caches[0][: length + size].astype(np.float64)
        latent, rope = known[:, : case.rank], known[:, case.rank :]
        if case.group:
            q = np.concatenate([absorb_codes(case, run.constants, q[..., : case.nope]), q_rope], -1)
            keys, values = (np.repeat(part[:, None], case.heads, axis=1) for part in (known, latent))
            mixed = attend(q, keys, values, length, 0, case.scale, None)
            y.append(expand_codes(case, run.constants, mixed).reshape(size, -1))
            continue
        keys = np.einsum("tr,ndr->tnd", latent, k_up)
        keys = np.concatenate([keys, np.repeat(rope[:, None], case.heads, axis=1)], -1)
        values = np.einsum("tr,nvr->tnv", latent, v_up)
        both = np.concatenate([q[..., : case.nope], q_rope], -1)
        y.append(attend(both, keys, values, length, 0, case.scale, None).reshape(size, -1))
    rest = np.zeros((len(run.inputs["q"]) - start, case.heads * case.value_size))
    return np.concatenate([*y, rest])


def reference(case: Grouped | Latent, run: Run) -> Array:
    return grouped_reference(case, run) if isinstance(case, Grouped) else latent_reference(case, run)


# --- random runs ----------------------------------------------------------------------------------------------------


def make_run(
    case: Grouped | Latent,
    lengths: list[int],
    sizes: list[int],
    generator: np.random.Generator,
    *,
    capacity: int | None = None,
    rows: int | None = None,
) -> Run:
    """`lengths` rows in each lane's caches, garbage behind them; `rows`: of the run, if more than the lanes take."""
    count = rows or sum(sizes)
    normal = generator.standard_normal
    pairs = case.pairs if isinstance(case, Grouped) else case.rope // 2
    positions = np.concatenate([length + np.arange(size) for length, size in zip(lengths, sizes, strict=True)])
    positions = np.concatenate([positions, np.zeros(count - len(positions))])
    angles = (positions[:, None] / 1.7 ** np.arange(1, pairs + 1))[None]
    inputs = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if isinstance(case, Grouped):
        for name, heads in (("q", case.heads), ("k", case.groups), ("v", case.groups)):
            inputs[name] = normal((count, heads * case.size), np.float32)
        constants: dict[str, Array | None] = {"sinks": normal(case.heads, np.float32) if case.sinks else None}
        for name in ("key_scales", "value_scales"):
            steps = (generator.random(case.groups * case.room, np.float32) + 0.5) / 40
            constants[name] = steps.astype(np.float32) if case.channels else None
        for name, heads in (("q_norm", case.heads), ("k_norm", case.groups)):
            if case.norm:
                constants[name] = normal(case.size * (heads if case.norm == "row" else 1), np.float32)
    else:
        inputs["q"] = normal((count, case.heads * (case.nope + case.rope)), np.float32)
        inputs["latent"] = normal((count, case.rank), np.float32)
        inputs["k_rope"] = normal((count, case.rope), np.float32)
        constants = {
            "k_up": normal((case.heads, case.nope, case.rank), np.float32) / np.float32(case.rank**0.5),
            "v_up": normal((case.heads, case.value_size, case.rank), np.float32) / np.float32(case.rank**0.5),
        }
        constants |= dict.fromkeys(("k_scales", "v_scales", "k_zeros", "v_zeros"))
        if case.group:
            constants |= quantize_heads(case, constants, generator)
        if case.norm:
            inputs["kv_a"] = np.concatenate([inputs.pop("latent"), inputs.pop("k_rope")], -1)
            constants["norm"] = normal(case.rank, np.float32)
    caches = [
        _make_caches(case, length, capacity or length + size, generator)
        for length, size in zip(lengths, sizes, strict=True)
    ]
    return Run(inputs, lengths, sizes, caches, constants)


def quantize_heads(
    case: Latent, floats: dict[str, Array | None], generator: np.random.Generator
) -> dict[str, Array | None]:
    """k_up and v_up in codes, with scales and, where the case has them, zero points."""
    made: dict[str, Array | None] = {}
    for name, bits in zip(("k", "v"), case.bits, strict=True):
        values = floats[f"{name}_up"]
        assert values is not None
        grouped, middle, spread = values.reshape(*values.shape[:2], -1, case.group), 1 << bits - 1, 1 << bits - 4
        scales = np.abs(grouped).max(-1) / np.float32(96 if bits == 8 else 7)
        if bits < 8:
            scales = scales.astype(np.float16)
        zeros = np.full(scales.shape, middle, np.uint8)
        if case.zero_points:
            zeros = generator.integers(middle - spread, middle + spread, scales.shape).astype(np.uint8)
        steps = np.rint(grouped / scales[..., None].astype(np.float32))
        codes = np.clip(steps + zeros[..., None], 0, 2 * middle - 1).astype(np.uint8).reshape(values.shape)
        made[f"{name}_up"] = pack_rows(codes) if bits == 4 else codes
        made[f"{name}_scales"] = scales
        made[f"{name}_zeros"] = (pack_rows(zeros) if bits == 4 else zeros) if case.zero_points else None
    return made


def pack_rows(codes: Array) -> Array:
    """uint8 [.., n] below 16, two to a byte, each row from a whole byte on."""
    return pack_int4(np.pad(codes, [(0, 0), (0, 0), (0, codes.shape[-1] % 2)]))


def unpack_rows(case: Latent, constants: dict[str, Array | None], name: str) -> tuple[Array, Array]:
    """Codes of k_up or v_up, one to a byte, and a zero point for each group, float32."""
    values, scales, zeros = (constants[f"{name}_{part}"] for part in ("up", "scales", "zeros"))
    bits = case.bits["kv".index(name)]
    assert values is not None and scales is not None
    if zeros is None:
        points = np.full(scales.shape, 1 << bits - 1)
    else:
        points = unpack_int4(zeros)[..., : scales.shape[-1]] if bits == 4 else zeros
    return unpack_int4(values) if bits == 4 else values, points.astype(np.float32)


def dequantized(case: Latent, constants: dict[str, Array | None], name: str) -> Array:
    """k_up or v_up float32, as `DequantizeLinear` has it."""
    values, scales = constants[f"{name}_up"], constants[f"{name}_scales"]
    assert values is not None
    if scales is None:
        return values
    codes, points = unpack_rows(case, constants, name)
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    found: Array = ((grouped - points[..., None]) * scales[..., None].astype(np.float32)).reshape(codes.shape)
    return found


def _make_caches(case: Grouped | Latent, length: int, capacity: int, generator: np.random.Generator) -> list[Array]:
    dtype = DTYPES[case.kind]
    width = case.room if isinstance(case, Grouped) else case.rank + case.rope
    shape = (1, case.groups, capacity, width) if isinstance(case, Grouped) else (capacity, width)
    made = []
    for _ in range(2 if isinstance(case, Grouped) else 1):
        if case.kind == "int8":
            cache: Array = generator.integers(-127, 128, shape).astype(dtype)
        else:
            cache = generator.standard_normal(shape, np.float32).astype(dtype)
            cache[..., length:, :] = np.nan  # nobody may read it before it is written
        made.append(cache)
    if isinstance(case, Latent) and case.kind == "int8":
        scales = ((generator.random((capacity, case.parts)) + 0.5) / 60).astype(np.float32)
        scales[length:] = np.nan
        made.append(scales)
    if isinstance(case, Grouped) and has_row_scales(case):
        for _ in range(2):
            steps = ((generator.random((1, case.groups, capacity, 1)) + 0.5) / 60).astype(np.float32)
            steps[:, :, length:] = np.nan
            made.append(steps)
    return made

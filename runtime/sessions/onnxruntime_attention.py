"""The attention weights of a text, read out of an onnxruntime engine's graph by choice.

The graph as built does not give them. For a look, a copy of it in memory gets them as further outputs: the softmax of
latent attention (`attention.LAYER`), and the kernel's own second result (`qk_output`) of grouped attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...bundle import MODEL
from ...errors import EngineError, require
from ..machine import default_threads

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo

_NAME = "attention."
_DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
_AFTER_SOFTMAX = 2  # GroupQueryAttention's qk_output


def read_attention(
    bundle: Bundle, info: EngineInfo, tokens: NDArray[np.int64], layers: Sequence[int], threads: int | None = None
) -> dict[int, NDArray[np.float32]]:
    """By layer the weights [heads, T, T] with which each of `tokens` [T] (row) looked at each (column).

    Raises:
        EngineError: a layer's attention is not in the graph. DependencyError: onnx or onnxruntime is not installed.
    """
    ort = require("onnxruntime", purpose=f"run engine '{info.profile}'")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or default_threads()
    settings.log_severity_level = 3
    folder = str(bundle.path.absolute())
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    model = _expose((bundle.engine_dir(info.profile) / MODEL).read_bytes(), layers, info.profile)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value in session.get_inputs():
        # The view of a cache ends with the run's own rows, which the graph writes there first: one buffer for both.
        shape = [size if isinstance(size, int) else 1 if size == "R" else len(tokens) for size in value.shape]
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _DTYPES[value.type]))
        if value.name == "input_ids":
            buffer = ort.OrtValue.ortvalue_from_numpy(tokens)
        binding.bind_ortvalue_input(value.name, buffer)
        if value.name.startswith("cache."):
            binding.bind_ortvalue_output(f"new.{value.name.removeprefix('cache.')}", buffer)
    for layer in layers:
        binding.bind_output(f"{_NAME}{layer}")
    session.run_with_iobinding(binding)
    found = binding.get_outputs()[-len(layers) :]
    return {layer: _by_head(output.numpy()) for layer, output in zip(layers, found, strict=True)}


def _by_head(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """[heads, T, T] of what the kernel gives, [1, heads, T, T], or the softmax, [T, heads, T]."""
    return weights[0] if weights.ndim == 4 else weights.transpose(1, 0, 2)


def _expose(model: bytes, layers: Sequence[int], profile: str) -> bytes:
    """The graph with the attention of `layers` among its outputs."""
    onnx = require("onnx", "export", purpose="look at attention")
    proto = onnx.load_model_from_string(model)
    values = {name for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            name = _NAME + node.output[1].rsplit(".", 1)[-1]
            node.output.extend([""] * (4 - len(node.output)))
            node.output[3] = name
            node.attribute.append(onnx.helper.make_attribute("qk_output", _AFTER_SOFTMAX))
            values.add(name)
    for layer in layers:
        name = f"{_NAME}{layer}"
        if name not in values:
            raise EngineError(
                f"engine '{profile}' has no attention of layer {layer} to look at; "
                f"build it again with this version of moedge: moedge build BUNDLE --profile {profile}"
            )
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return bytes(proto.SerializeToString())


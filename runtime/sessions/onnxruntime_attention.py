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
    known = {"S": len(tokens), "R": 1, "P": 0, "capacity": len(tokens)}
    feeds = {}
    for value in session.get_inputs():
        kind = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
        dtype = kind.get(value.type, np.int8 if value.type == "tensor(int8)" else np.uint8)
        feeds[value.name] = np.zeros([known.get(size, size) for size in value.shape], dtype)
    feeds["input_ids"] = tokens
    found = session.run([f"{_NAME}{layer}" for layer in layers], feeds)
    return {layer: values.reshape(values.shape[-3:]) for layer, values in zip(layers, found, strict=True)}


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


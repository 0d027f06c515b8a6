"""A lowered graph with its cache, run as the sessions run it, for tests that lower with settings of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

Array = np.ndarray[Any, Any]


class LoweredGraph:
    """One sequence in a model that `profiles.targets.onnxruntime.lower` has rewritten; `cache` is what it returned."""

    def __init__(self, model: ir.Model, cache: list[Any], bundle: Path, capacity: int = 128) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
        self.proto = ir.to_proto(model)
        self.session = ort.InferenceSession(self.proto.SerializeToString(), options)
        self.cache = cache
        self.length = 0
        self.buffers = {
            entry.name: np.zeros(
                (1, entry.heads, capacity, entry.width // entry.heads) if entry.heads else (capacity, entry.width),
                entry.dtype,
            )
            for entry in cache
        }

    def step(self, ids: Array) -> dict[str, Array]:
        """Put tokens behind the others; the outputs but those of the cache, by name, with logits after each token."""
        binding = self.session.io_binding()
        end = self.length + len(ids)
        inputs: dict[str, Array] = {"input_ids": np.asarray(ids, np.int64), "rows": np.arange(len(ids))}
        outputs: dict[str, Array] = {}
        for entry in self.cache:
            buffer = self.buffers[entry.name]
            if entry.heads:
                inputs |= {f"past.{entry.name}": buffer, "length": np.array([self.length])}
                outputs[f"new.{entry.name}"] = buffer
            else:
                inputs[f"cache.{entry.name}"] = buffer[:end]
                outputs[f"new.{entry.name}"] = buffer[self.length : end]
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        rest = [value.name for value in self.session.get_outputs() if value.name not in outputs]
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in rest:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip([*outputs, *rest], binding.get_outputs(), strict=True))
        self.length = end
        return {name: found[name].numpy() for name in rest}

"""A CUDA device with TensorRT engines, by cuda-bindings and either of TensorRT's Python packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError, require
from ._trt_engines import Plan

CUDA = "cuda.bindings.runtime"


class CudaDevice:
    """Device 0 and one stream; see `Device` for what the members do.

    Runs that repeat become a CUDA graph on their second time: one launch in place of one for each kernel.
    """

    def __init__(self, trt: ModuleType) -> None:
        self._trt: Any = trt
        self._cuda: Any = require(CUDA, "rtx", "run a TensorRT engine")
        self._logger = _make_logger(trt)
        self._runtime: Any = None
        self._stream = self._call("cudaStreamCreate")
        self._graph: Any = None
        self._seen: tuple[int, ...] = ()
        self._runtime = trt.Runtime(self._logger)

    def allocate(self, nbytes: int) -> int:
        address = int(self._call("cudaMalloc", max(nbytes, 1)))
        self.clear(address, max(nbytes, 1))
        return address

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def clear(self, address: int, nbytes: int) -> None:
        self._call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def write(self, address: int, values: NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = np.ascontiguousarray(values)
        # Pageable memory is staged before the call returns, so `source` may go.
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def read(self, address: int, values: NDArray[Any]) -> None:
        assert values.flags.c_contiguous
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", values.ctypes.data, address, values.nbytes, kind, self._stream)
        self._call("cudaStreamSynchronize", self._stream)

    def load(self, path: Path) -> CudaPlan:
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"{path}: TensorRT {self._trt.__version__} refuses it: {self._logger.last_error}")
        return CudaPlan(self, engine, self._logger)

    def run(self, plans: Sequence[Plan], *, repeats: bool) -> None:
        key = tuple(part for plan in plans for part in plan.state()) if repeats else ()  # type: ignore[attr-defined]
        if repeats and key == self._seen and self._graph is None:
            self._capture(plans)
        if repeats and key == self._seen and self._graph is not None:
            self._call("cudaGraphLaunch", self._graph, self._stream)
            return
        if repeats:
            self._drop_graph()
            self._seen = key
        elif self._graph is None:
            self._seen = ()  # TensorRT wants a plain run after each change of shapes before it is captured
        for plan in plans:
            plan.enqueue()

    def close(self) -> None:
        self._drop_graph()
        self._runtime = None
        if self._stream is not None:
            self._call("cudaStreamDestroy", self._stream)
            self._stream = None

    @property
    def stream(self) -> int:
        return int(self._stream)

    def check_enqueued(self, done: bool) -> None:
        if not done:
            raise EngineError(f"TensorRT {self._trt.__version__} did not run the engine: {self._logger.last_error}")

    def _capture(self, plans: Sequence[Plan]) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        for plan in plans:
            plan.enqueue()
        graph = self._call("cudaStreamEndCapture", self._stream)
        self._graph = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._call("cudaGraphExecDestroy", self._graph)
            self._graph = None
        self._seen = ()

    def _call(self, name: str, *arguments: Any) -> Any:
        """A call of the CUDA runtime; its one result, or None."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            _, text = self._cuda.cudaGetErrorString(error)
            said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            raise EngineError(f"CUDA refuses {name}: {said} (error {int(error)})")
        return results[0] if results else None


class CudaPlan:
    """One engine with one execution context; see `Plan` for what the members do."""

    def __init__(self, device: CudaDevice, engine: Any, logger: Any) -> None:
        self._device = device
        self._engine = engine
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"TensorRT made no context for an engine: {logger.last_error}")
        self._addresses: dict[str, int] = {}
        self._profile = 0

    def bind(self, name: str, address: int) -> None:
        self._addresses[name] = address
        self._device.check_enqueued(self._context.set_tensor_address(name, address))

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._device.check_enqueued(self._context.set_input_shape(name, shape))

    def set_profile(self, index: int) -> None:
        self._profile = index
        self._device.check_enqueued(self._context.set_optimization_profile_async(index, self._device.stream))
        for name, address in self._addresses.items():
            self._context.set_tensor_address(name, address)

    def enqueue(self) -> None:
        self._device.check_enqueued(self._context.execute_async_v3(self._device.stream))

    def state(self) -> tuple[int, ...]:
        """What a captured run depends on."""
        return (id(self), self._profile, *self._addresses.values())

    def close(self) -> None:
        self._context = None
        self._engine = None


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, which is what a refusal is said with."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = " ".join(message.split())

    return Logger()

"""Backend `onnxruntime` on the CPU: the lowered graph, and a KV cache that is never copied.

The graph takes the past of each cache entry as an input [P, width] and gives the rows of the new tokens as an output
[S, width]. Both are bound to one buffer [capacity, width]: the past as a view of its first P rows, the new rows right
behind it. So a step writes S rows and copies none, and rewinding is a smaller P. Attention with key and value heads has
its cache by heads instead [1, heads, capacity, head size]: one buffer that is the kernel's input and its output.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import MODEL
from ...errors import EngineError, require
from ..machine import default_threads
from . import Findings, OneLane, Routing, SessionOptions, check_room, check_routing

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import CacheEntry, EngineInfo

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
_CPU = ("cpu", 0)  # onnxruntime's device type and id


def version() -> str | None:
    """The installed onnxruntime's version."""
    # Not importlib.metadata: onnxruntime-gpu and others bring the same module under other names.
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    return str(require("onnxruntime").__version__)


def check(folder: Path, info: EngineInfo) -> Findings:
    """Nothing beyond checksums: loading is quick, and says itself what is wrong."""
    return Findings()


def cannot_run(info: EngineInfo) -> str | None:
    """A CPU engine runs wherever onnxruntime is installed; where it is not, loading names the command."""
    return None


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> OnnxruntimeCpuSession:
    """Load the engine.

    Raises:
        EngineError: onnxruntime refuses the graph, or the cache does not fit the memory.
        DependencyError: onnxruntime is not installed.
    """
    session, threads = open_onnxruntime(bundle, info, options)
    return OnnxruntimeCpuSession(session, info, options.max_seq_len or info.max_seq_len, threads)


def open_onnxruntime(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> tuple[Any, int]:
    """onnxruntime's session of an engine's graph over the bundle's weights, and its threads; raises as above."""
    ort = require("onnxruntime", purpose=f"run engine '{info.profile}'")
    threads = options.threads or default_threads()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    # A memory plan is kept for every shape of the inputs, and each step has a new one: that would be a leak.
    settings.enable_mem_pattern = False
    settings.log_severity_level = 3
    if options.profile_prefix is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = options.profile_prefix
    entries = {
        "session.intra_op.allow_spinning": "1",
        "session.model_external_initializers_file_folder_path": str(bundle.path.absolute()),
        **info.session.get("config", {}),
    }
    for name, value in entries.items():
        settings.add_session_config_entry(name, str(value))
    model = bundle.engine_dir(info.profile) / MODEL
    try:
        session = ort.InferenceSession(model.read_bytes(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, each straight from Exception
        first = (str(error).splitlines() or [""])[0]
        raise EngineError(
            f"onnxruntime {ort.__version__} cannot load {model} ({first}); "
            f"build it again: moedge build {bundle.path} --profile {info.profile}"
        ) from error
    return session, threads


class OnnxruntimeCpuSession(OneLane):
    """One sequence in an onnxruntime session; see `Session` for what the members do."""

    def __init__(self, session: Any, info: EngineInfo, capacity: int, threads: int) -> None:
        self._session: Any = session
        self._binding: Any = session.io_binding()
        self._info = info
        self._vocab = info.vocab_size
        self._moe_layers = info.moe_layers
        self._length = 0
        self._capacity = capacity
        self._threads = threads
        _check_interface(session, info)
        self._cache: dict[str, NDArray[Any]] = {}
        # (name of the past, name of the new rows, width, dtype, address, bytes a row): what each step binds.
        self._entries: list[tuple[str, str, int, type[Any], int, int]] = []
        self._past = np.zeros(1, np.int64)  # P, for graphs that cannot see it in a cache's shape
        for entry in info.cache:
            if entry.heads:
                self._bind_in_place(entry)
                continue
            buffer = aligned_empty((capacity, entry.width), np.dtype(entry.dtype))
            self._cache[entry.name] = buffer
            row = entry.width * buffer.itemsize
            place = (entry.width, buffer.dtype.type, buffer.ctypes.data, row)
            self._entries.append((f"past.{entry.name}", f"new.{entry.name}", *place))
        if any(entry.heads for entry in info.cache):
            self._binding.bind_input("length", *_CPU, np.int64, (1,), self._past.ctypes.data)
        self._token = np.zeros(1, dtype=np.int64)
        self._zero_row = np.zeros(1, dtype=np.int64)
        self._logits = aligned_empty((1, self._vocab), np.dtype(np.float32))
        self._bound_tokens = -1  # S of the last step: what depends on it alone is bound again only when it changes
        self._bound_logits: Any = None
        self._routing = Routing(np.empty((0, 0, 0), np.int64), np.empty((0, 0, 0), np.float32))

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def routing(self) -> Routing:
        return self._routing

    def step(
        self,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        count = len(input_ids)
        past = self._length
        check_room(self._capacity, past, count)
        if count == 1 and len(rows) == 1 and out is None:
            logits = self._bind_one(int(input_ids[0]))
        else:
            logits = self._bind_many(input_ids, rows, out)
        self._past[0] = past
        bind_input, bind_output = self._binding.bind_input, self._binding.bind_output
        for past_name, new_name, width, kind, address, row in self._entries:
            bind_input(past_name, *_CPU, kind, (past, width), address)
            bind_output(new_name, *_CPU, kind, (count, width), address + past * row)
        self._run()
        check_routing(self._routing, self._moe_layers, past)
        self._length = past + count
        return logits

    def _bind_in_place(self, entry: CacheEntry) -> None:
        """Bind a cache by heads once: the same buffer as past and as present."""
        shape = (1, entry.heads, self._capacity, entry.width // entry.heads)
        buffer = aligned_empty(shape, np.dtype(entry.dtype))
        self._cache[entry.name] = buffer
        place = (*_CPU, buffer.dtype.type, shape, buffer.ctypes.data)
        self._binding.bind_input(f"past.{entry.name}", *place)
        self._binding.bind_output(f"new.{entry.name}", *place)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._length = length

    def another(self) -> OnnxruntimeCpuSession:
        return OnnxruntimeCpuSession(self._session, self._info, self._capacity, self._threads)

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"cannot read tokens {start} to {stop} of {self._length}")
        return [rows.copy() for rows in self._rows(start, stop)]

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        count = rows[0].shape[-2] if rows and rows[0].ndim >= 2 else 0
        if self._length + count > self._capacity:
            raise ValueError(f"no room for {count} tokens: {self._length} of {self._capacity} are taken")
        places = self._rows(self._length, self._length + count)
        if [(part.shape, part.dtype) for part in rows] != [(place.shape, place.dtype) for place in places]:
            raise ValueError("these rows are of another cache")
        for place, part in zip(places, rows, strict=True):
            place[:] = part
        self._length += count

    def _rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        """Views of each cache tensor's tokens: [tokens, width], or [1, heads, tokens, head size]."""
        return [buffer[..., start:stop, :] for buffer in self._cache.values()]

    def end_profiling(self) -> Path:
        """The profile (Chrome's trace format) of a session that was opened with `profile_prefix`."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        # The binding holds the session too; the arrays go with their last view.
        self._binding = None
        self._session = None
        self._cache.clear()
        self._entries.clear()

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            text = str(error)
            if "allocat" not in text and "bad_alloc" not in text:
                raise
            raise EngineError(
                "not enough memory for this step; give a shorter prompt, or load with a smaller max_seq_len"
            ) from error

    def _bind_one(self, token: int) -> NDArray[np.float32]:
        """Bind one token and its logits to buffers that stay: while decoding this is bound once."""
        self._token[0] = token
        if self._bound_logits is not self._logits:
            self._bind_inputs(self._token, self._zero_row)
            self._bind_logits(self._logits)
        self._bind_routing(1)
        return self._logits

    def _bind_many(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        logits = np.empty((len(rows), self._vocab), np.float32) if out is None else out
        assert logits.shape == (len(rows), self._vocab) and logits.flags.c_contiguous and logits.dtype == np.float32
        self._bind_inputs(np.ascontiguousarray(input_ids, np.int64), np.ascontiguousarray(rows, np.int64))
        self._bind_logits(logits)
        self._bind_routing(len(input_ids))
        return logits

    def _bind_inputs(self, input_ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        self._inputs = (input_ids, rows)  # the binding holds their addresses only
        self._binding.bind_input("input_ids", *_CPU, np.int64, input_ids.shape, input_ids.ctypes.data)
        self._binding.bind_input("rows", *_CPU, np.int64, rows.shape, rows.ctypes.data)

    def _bind_logits(self, logits: NDArray[np.float32]) -> None:
        self._bound_logits = logits
        self._binding.bind_output("logits", *_CPU, np.float32, logits.shape, logits.ctypes.data)

    def _bind_routing(self, count: int) -> None:
        if count == self._bound_tokens:
            return
        top_k = self._info.num_experts_per_tok
        shape = (len(self._moe_layers), count, top_k)
        self._routing = Routing(np.empty(shape, np.int64), np.empty(shape, np.float32))
        for index, layer in enumerate(self._moe_layers):
            for name, values in self._routing._asdict().items():
                address = values[index].ctypes.data
                self._binding.bind_output(f"{name}.{layer}", *_CPU, values.dtype.type, (count, top_k), address)
        self._bound_tokens = count


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialized array whose first byte is aligned to a cache line; pages are taken when they are written."""
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        raw = np.empty(size + _ALIGNMENT, np.uint8)
    except MemoryError:
        raise EngineError(
            f"a cache of {size / 2**20:,.0f} MiB does not fit the memory; load with a smaller max_seq_len"
        ) from None
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _check_interface(session: Any, info: EngineInfo) -> None:
    """Compare what the graph takes and gives with what engine.json says: a mix-up would write past a buffer."""
    has = {value.name: value for value in [*session.get_inputs(), *session.get_outputs()]}
    wanted = ["input_ids", "rows", "logits"]
    wanted += [f"{kind}.{layer}" for kind in ("experts", "weights") for layer in info.moe_layers]
    widths = {
        f"{kind}.{entry.name}": entry.width // (entry.heads or 1) for kind in ("past", "new") for entry in info.cache
    }
    widths["logits"] = info.vocab_size
    widths |= dict.fromkeys(wanted[3:], info.num_experts_per_tok)
    for name in [*wanted, *widths]:
        width = has[name].shape[-1] if name in has else None
        if name not in has or (isinstance(width, int) and width != widths.get(name, width)):
            raise EngineError(
                f"engine '{info.profile}' is not what its engine.json says ({name} is missing or of another width); "
                f"build it again: moedge build BUNDLE --profile {info.profile}"
            )

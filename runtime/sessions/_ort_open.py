"""What every onnxruntime session of an engine is opened with, on whatever device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import WEIGHTS
from ...errors import EngineError
from ..machine import default_threads

if TYPE_CHECKING:
    from ...bundle import Bundle
    from . import SessionOptions


def make_settings(ort: Any, bundle: Bundle, options: SessionOptions) -> tuple[Any, int]:
    """onnxruntime's SessionOptions over the bundle's weights, and the threads in them.

    Raises:
        EngineError: weights.bin is a link to a file of another name.
    """
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
    weights = bundle.file(WEIGHTS).resolve()  # onnxruntime follows no link out of the folder it is told
    if weights.name != WEIGHTS:
        raise EngineError(
            f"{bundle.file(WEIGHTS)} is a link to {weights}, which onnxruntime does not follow: link to a file that is "
            f"called {WEIGHTS}, or copy the file"
        )
    folder = str(weights.parent)
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return settings, threads


def load_graph(
    ort: Any, model: Path, settings: Any, again: str, provider: str = "CPUExecutionProvider", **options: str
) -> Any:
    """onnxruntime's session of a graph; `again`: the command that makes the engine anew, `options`: the provider's.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    try:
        return ort.InferenceSession(model.read_bytes(), settings, providers=[provider], provider_options=[options])
    except Exception as error:  # onnxruntime's own classes, each straight from Exception
        first = (str(error).splitlines() or [""])[0]
        version = ort.__version__
        raise EngineError(f"onnxruntime {version} cannot load {model} ({first}); build it again: {again}") from error

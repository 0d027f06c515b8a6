"""Target `tensorrt_rtx`: engines for NVIDIA GPUs by TensorRT for RTX, which needs no GPU to build them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle import MODEL, Bundle, Progress
from ...errors import BuildError, require
from ...export.config import MoEConfig
from . import BuildRequest
from ._canonical import load_canonical
from ._trt_build import LOG, BuildJob, run_builder
from ._trt_check import check_numerics, measure_half
from ._trt_log import read_build_log
from .tensorrt_network import CHUNK, LoweredNetwork, lower_network

PACKAGE = "tensorrt_rtx"
# TF32 would round the router's float32 products, and with them the choice of experts.
SETTINGS: dict[str, Any] = {"tf32": False}


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Lower, check, and build engine.plan with its build.log; the lowered model.onnx stays without its weights.

    Raises:
        BuildError: a device or size beyond this target, or the builder failed.
        ParityError: the lowered network is not the canonical graph.
        DependencyError: tensorrt_rtx or onnxruntime is not installed.
    """
    package = require(PACKAGE, purpose=f"build an engine for {request.device.name}")
    capability = check_device(package, request)
    prepared = prepare_network(request, folder, progress)
    job = BuildJob(
        package=PACKAGE,
        model=folder / MODEL,
        folder=folder,
        compute_capability=capability,
        profiles=shape_profiles(request.max_seq_len),
        settings=SETTINGS,
        failed_log=request.bundle.engine_dir(request.device.name + ".failed.log"),
    )
    result = run_builder(job, f"building for {request.device.name} (SM{capability[0]}{capability[1]})", progress)
    (folder / prepared.network.weights.location).unlink()  # the engine has its own copy
    fields = prepared.fields | {
        "backend": PACKAGE,
        "backend_version": result["version"],
        "compute_capability": list(capability),
        "status": "ready",
        "peak_build_memory_bytes": result["peak_bytes"],
    }
    fields["session"] |= describe_result(result, folder, prepared.smallest_matrix)
    return fields


def check_device(package: Any, request: BuildRequest) -> tuple[int, int]:
    """The device's compute capability, if the package builds for it.

    Raises:
        BuildError: it does not; lists those it does.
    """
    known = sorted(name for name in package.ComputeCapability.__members__ if name.startswith("SM"))
    capability = request.device.compute_capability
    if capability is None:
        raise BuildError(
            f"{request.device.name} has no compute capability, and TensorRT builds for NVIDIA GPUs alone; "
            "use --backend onnxruntime"
        )
    if f"SM{capability[0]}{capability[1]}" not in known:
        raise BuildError(
            f"tensorrt_rtx {package.__version__} does not build for {request.device.name} "
            f"(SM{capability[0]}{capability[1]}); it builds for {', '.join(known)}; use --backend tensorrt to prepare "
            "a folder that is finished on the device, or --backend onnxruntime"
        )
    return capability


class PreparedNetwork:
    """A network written into a folder, and what engine.json says of it whoever builds it."""

    def __init__(self, network: LoweredNetwork, config: MoEConfig, fields: dict[str, Any]) -> None:
        self.network = network
        self.fields = fields
        # Of the experts' matrices: a kernel that writes as much out writes experts out.
        self.smallest_matrix = config.moe.intermediate_size * config.hidden_size


def prepare_network(request: BuildRequest, folder: Path, progress: Progress | None) -> PreparedNetwork:
    """Check the lowering, then write model.onnx and its weights in half precision."""
    if request.max_batch != 1:
        raise BuildError(
            f"max_batch {request.max_batch}: a TensorRT engine of this version runs one sequence; use --max-batch 1"
        )
    if request.max_seq_len < 2:
        raise BuildError(f"max_seq_len {request.max_seq_len}: a TensorRT engine needs room for 2 tokens or more")
    numerics = check_numerics(request.bundle, progress)
    model, config = load_canonical(request.bundle)
    network = lower_network(model, config, request.max_seq_len, real=ir.DataType.FLOAT16)
    network.weights.write(folder / network.weights.location, progress)
    network.save(folder, MODEL)
    numerics["half_precision"] = measure_half(request.bundle, folder, progress)
    return PreparedNetwork(network, config, describe_network(request.bundle, network, request.max_seq_len, numerics))


def shape_profiles(max_seq_len: int) -> list[dict[str, list[list[int]]]]:
    """P0: exactly one token. P1: a chunk. Each asks for the logits of one row."""
    chunk = min(CHUNK, max_seq_len)
    one: list[list[int]] = [[1], [1], [1]]
    return [{"input_ids": one, "rows": one}, {"input_ids": [[2], [chunk], [chunk]], "rows": one}]


def describe_network(
    bundle: Bundle, network: LoweredNetwork, max_seq_len: int, numerics: dict[str, Any]
) -> dict[str, Any]:
    """engine.json's fields that follow from the network."""
    weights = bundle.manifest["quantization"]["weights"]
    names = [name for name, _ in network.cache]
    return {
        "precision": f"{weights} weights, fp16 products, fp32 router, norms and residual",
        "max_batch": 1,
        "max_seq_len": max_seq_len,
        "cache": [{"name": name, "width": width, "dtype": "float16"} for name, width in network.cache],
        "session": {
            "inputs": [str(value.name) for value in network.model.graph.inputs],
            "outputs": [str(value.name) for value in network.model.graph.outputs],
            "profiles": shape_profiles(max_seq_len),
            "cache": {
                "shape": [1, 1, max_seq_len, "width"],
                "aliased": {f"past.{name}": f"present.{name}" for name in names},
                "initial": "zeros",  # slots behind the length are masked, and 0 times NaN is NaN
            },
            "numerics": numerics,
            "network_weights_bytes": network.weights.nbytes,
        },
    }


def describe_result(result: dict[str, Any], folder: Path, smallest_matrix: int) -> dict[str, Any]:
    """What the builder and its log say of the engine, for engine.json's `session`."""
    memory = read_build_log(folder / LOG).to_json(smallest_matrix)
    return {"memory": memory, "validity": result["validity"], "builder_seconds": result["seconds"]}

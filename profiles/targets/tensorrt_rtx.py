"""Target `tensorrt_rtx`: engines for NVIDIA GPUs by TensorRT for RTX, which needs no GPU to build them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...bundle import Progress
from ...errors import BuildError, require
from ..device import DeviceProfile
from . import BuildRequest
from ._routes import trace_network
from ._trt_build import BuildJob, run_builder
from ._trt_check import check_numerics
from ._trt_network_files import (
    SETTINGS,
    Prepared,
    add_memory,
    describe_part,
    plan_build,
    prepare_network,
    read_cuda_major,
    shape_profiles,
    together_bytes,
    write_part,
)
from ._trt_parts import Part, too_small
from .tensorrt_network import LoweredNetwork

PACKAGE = "tensorrt_rtx"

trace_routes = trace_network


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Lower, check, and build engine.plan with its build.log; the lowered model.onnx stays without its weights.

    With `request.max_memory` there may be several, each for a range of layers.

    Raises:
        BuildError: a device or size beyond this target, or the builder failed.
        ParityError: the lowered network is not the canonical graph.
        DependencyError: tensorrt_rtx or onnxruntime is not installed.
    """
    package = require(PACKAGE, purpose=f"build an engine for {request.device.name}")
    capabilities = tuple(dict.fromkeys(check_device(package, device) for device in request.devices))
    prepared = prepare_network(request, request.max_memory, progress)
    names = ", ".join(f"SM{major}{minor}" for major, minor in capabilities)
    title = f"building for {' and '.join(device.name for device in request.devices)} ({names})"

    def job_of(part: Part, network: LoweredNetwork) -> tuple[BuildJob, str]:
        job = BuildJob(
            package=PACKAGE,
            model=folder / part.model,
            folder=folder,
            compute_capabilities=capabilities,
            profiles=shape_profiles(network, request.max_seq_len),
            settings=SETTINGS,
            failed_log=request.bundle.engine_dir(request.device.name + ".failed.log"),
            plan_name=part.plan,
            log_name=part.log,
        )
        return job, title + (f", layers {part.start} to {part.stop - 1}" if part.suffix else "")

    parts, results = build_parts(request, prepared, folder, job_of, progress)
    if [part["layers"] for part in parts] != [[part.start, part.stop] for part in prepared.parts]:
        final = [Part(part["layers"][0], part["layers"][1], prepared.total) for part in parts]
        prepared.numerics.update(
            check_numerics(
                request.bundle, progress, parts=final, memory=prepared.check_bytes, form=prepared.form
            )
        )
    fields = prepared.fields | {
        "backend": PACKAGE,
        "backend_version": results[0]["version"],
        "cuda_minimum": read_cuda_major(PACKAGE),
        "compute_capability": list(capabilities[0]),
        "status": "ready",
        "peak_build_memory_bytes": max(together_bytes(part) for part in parts),
    }
    built_for = [list(capability) for capability in capabilities]
    fields["session"] |= {"compute_capabilities": built_for, "max_build_memory_bytes": request.max_memory}
    fields["session"] |= {"parts": parts, **add_memory(parts)}
    return fields


def build_parts(
    request: BuildRequest,
    prepared: Prepared,
    folder: Path,
    job_of: Callable[[Part, LoweredNetwork], tuple[BuildJob, str]],
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One engine after the other; a part that took more than the bound, this process included, is built again as two.

    Returns the parts as engine.json has them, and what the builder said of each.

    Raises:
        BuildError: the builder failed, or a single layer takes more than the bound.
    """
    waiting, parts, results = list(prepared.parts), [], []
    while waiting:
        part = waiting.pop(0)
        network = write_part(request, part, prepared.form, folder, progress)
        if not part.suffix:
            prepared.measure_half(request, [folder / part.model], progress)
        job, title = job_of(part, network)
        result = run_builder(job, title, progress)
        (folder / part.weights).unlink()  # the engine has its own copy
        built = describe_part(part, network, request.max_seq_len, result, folder, prepared.smallest_matrix)
        if request.max_memory is not None and together_bytes(built) > request.max_memory:
            if part.stop - part.start == 1:
                raise too_small(request.max_memory, together_bytes(built), result["caller_bytes"])
            for name in (part.model, part.plan, part.log):
                (folder / name).unlink()
            waiting[:0] = part.halves()
            continue
        parts.append(built)
        results.append(result)
    return parts, results


def plan(request: BuildRequest) -> list[dict[str, Any]]:
    """What `build` would make, for the dry run, which needs no TensorRT.

    Raises what `build` raises before it builds.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        for device in request.devices:
            check_device(require(PACKAGE), device)
    return plan_build(request, request.max_memory)


def check_device(package: Any, device: DeviceProfile) -> tuple[int, int]:
    """The device's compute capability, if the package builds for it.

    Raises:
        BuildError: it does not; lists those it does.
    """
    known = sorted(name for name in package.ComputeCapability.__members__ if name.startswith("SM"))
    capability = device.compute_capability
    if capability is None:
        raise BuildError(
            f"{device.name} has no compute capability, and TensorRT builds for NVIDIA GPUs alone; "
            "use --backend onnxruntime"
        )
    if f"SM{capability[0]}{capability[1]}" not in known:
        raise BuildError(
            f"tensorrt_rtx {package.__version__} does not build for {device.name} "
            f"(SM{capability[0]}{capability[1]}); it builds for {', '.join(known)}; use --backend tensorrt to prepare "
            "a folder that is finished on the device, or --backend onnxruntime"
        )
    return capability

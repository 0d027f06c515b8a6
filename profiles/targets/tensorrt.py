"""Target `tensorrt`: engines by the TensorRT of JetPack and data centres, which builds only on the device itself.

Elsewhere `build` writes a folder with all that the device needs; `moedge build FOLDER` finishes it there, and goes on
behind the last finished part where it was interrupted.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from ...bundle import Progress, file_entry, find_faults, read_json, write_json
from ...errors import BuildError
from ...runtime import machine
from . import BuildRequest
from ._routes import trace_network
from ._trt_build import BuildJob, run_builder
from ._trt_network_files import (
    SETTINGS,
    add_memory,
    describe_plain_part,
    describe_result,
    plan_build,
    prepare_network,
    read_cuda_major,
    together_bytes,
    write_part,
)

PACKAGE = "tensorrt"
MINIMUM = (10, 15)  # the in-place cache layer came with it
FOLDER_FORMAT = 2
MANIFEST = "build.json"

trace_routes = trace_network

_README = """\
This folder holds a model lowered for TensorRT {minimum} or later, to be built on {title} (build.json says how).
On the device, with JetPack's TensorRT and `pip install moedge`: moedge build {folder}
It runs as engines/{folder} of its bundle, whose weights.bin may stay behind: moedge generate BUNDLE --profile {folder}
"""


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write the lowered network, its weights and build.json; build at once where this machine is the device.

    The network is cut so that building a part fits `request.max_memory`, or the device's memory where that is not
    given.

    Raises:
        BuildError: a size beyond this target, or the builder failed.
        ParityError: the lowered network is not the canonical graph.
        DependencyError: onnxruntime is not installed.
    """
    capability, bound = _check_capability(request), _pick_bound(request)
    prepared = prepare_network(request, bound, progress)
    fields = prepared.fields | {
        "backend": PACKAGE,
        "backend_version": f">={_dotted(MINIMUM)}",
        "compute_capability": list(capability),
        "status": "prepared",
    }
    parts = []
    for part in prepared.parts:
        network = write_part(request, part, prepared.form, folder, progress)
        parts.append(describe_plain_part(part, network, request.max_seq_len))
    prepared.measure_half(request, [folder / part.model for part in prepared.parts], progress)
    fields["session"] |= {"parts": parts, "max_build_memory_bytes": bound}
    files = [name for part in prepared.parts for name in (part.model, part.weights)]
    _write_manifest(request, folder, fields, prepared.smallest_matrix, files)
    if importlib.util.find_spec(PACKAGE) is not None and _is_here(capability):
        fields |= finish(folder, progress)
    return fields


def plan(request: BuildRequest) -> list[dict[str, Any]]:
    """What `build` would make, for the dry run.

    Raises what `build` raises before it builds.
    """
    _check_capability(request)
    return plan_build(request, _pick_bound(request))


def _check_capability(request: BuildRequest) -> tuple[int, int]:
    capability = request.device.compute_capability
    if capability is None:
        raise BuildError(
            f"{request.device.name} has no compute capability, and TensorRT builds for NVIDIA GPUs alone; "
            "use --backend onnxruntime"
        )
    return capability


def _pick_bound(request: BuildRequest) -> int:
    return request.max_memory or request.device.available_bytes


def _write_manifest(
    request: BuildRequest, folder: Path, fields: dict[str, Any], smallest_matrix: int, files: list[str]
) -> None:
    """build.json, which is all that the device goes by, and three lines for whoever finds the folder."""
    manifest = {
        "format": FOLDER_FORMAT,
        "target": PACKAGE,
        "profile": request.device.name,
        "device": request.device.title,
        "package": PACKAGE,
        "package_minimum": _dotted(MINIMUM),
        "compute_capability": fields["compute_capability"],
        "settings": SETTINGS,
        "parts": fields["session"]["parts"],
        "built": {},  # by engine: grows on the device, part by part
        "smallest_matrix": smallest_matrix,
        "session": fields["session"],
        "files": {name: file_entry(folder / name) for name in files},
    }
    write_json(folder / MANIFEST, manifest)
    readme = _README.format(minimum=_dotted(MINIMUM), title=request.device.title, folder=request.device.name)
    (folder / "README.txt").write_text(readme, encoding="utf-8")


def finish(folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Build, on the device, what `build` prepared elsewhere; returns the fields of engine.json that change.

    Raises:
        BuildError: the folder is damaged, TensorRT is missing or old, this is not the device, or the builder failed.
    """
    manifest = _read_manifest(folder)
    faults = find_faults(folder, manifest["files"], progress)
    if faults:
        raise BuildError(
            f"{faults[0]}: the folder was damaged on its way; copy it again, or prepare it again: moedge build BUNDLE "
            f"--profile {manifest['profile']}"
        )
    _check_machine(folder, manifest)
    parts = [_finish_part(folder, manifest, part, progress) for part in manifest["parts"]]
    session = manifest["session"] | {"parts": parts, **add_memory(parts)}
    versions = {str(manifest["built"][part["engine"]]["version"]) for part in parts}
    if len(versions) > 1:
        raise BuildError(
            f"{folder}: its parts were built by different versions of TensorRT ({', '.join(sorted(versions))}); delete "
            f"its .plan files, then: moedge build {folder}"
        )
    return {
        "backend_version": versions.pop(),
        "cuda_minimum": read_cuda_major(str(manifest["package"])),
        "status": "ready",
        "peak_build_memory_bytes": max(together_bytes(part) for part in parts),
        "session": session,
    }


def _finish_part(
    folder: Path, manifest: dict[str, Any], part: dict[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Build one part, or take it as an earlier run left it; build.json knows at once which are done."""
    built = manifest["built"].get(part["engine"])
    if built is None or find_faults(folder, {part["engine"]: built["file"]}):
        job = BuildJob(
            package=str(manifest["package"]),
            model=folder / part["model"],
            folder=folder,
            compute_capabilities=(),
            profiles=part["profiles"],
            settings=manifest["settings"],
            failed_log=folder / part["log"],
            plan_name=part["engine"],
            log_name=part["log"],
        )
        layers = f", layers {part['layers'][0]} to {part['layers'][1] - 1}" if len(manifest["parts"]) > 1 else ""
        result = run_builder(job, f"building for {manifest['profile']}{layers}", progress)
        described = describe_result(result, folder / part["log"], int(manifest["smallest_matrix"]))
        built = {"file": file_entry(folder / part["engine"]), "version": result["version"], "described": described}
        manifest["built"][part["engine"]] = built
        write_json(folder / MANIFEST, manifest)
    finished: dict[str, Any] = part | built["described"]
    return finished


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path, BuildError)
    again = "prepare the folder again: moedge build BUNDLE --profile NAME"
    wanted = "format profile device package package_minimum compute_capability settings parts built session files"
    missing = [key for key in (*wanted.split(), "smallest_matrix") if key not in manifest]
    if missing:
        raise BuildError(f"{path}: missing {', '.join(missing)}; {again}")
    if manifest["format"] != FOLDER_FORMAT:
        raise BuildError(f"{path}: format {manifest['format']}, this version reads {FOLDER_FORMAT}; {again}")
    return manifest


def _check_machine(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises BuildError with all that keeps this machine from finishing the folder: TensorRT, its version, the GPU."""
    capability = (int(manifest["compute_capability"][0]), int(manifest["compute_capability"][1]))
    missing = [text for text in (_find_package_fault(manifest), _find_gpu_fault(manifest, capability)) if text]
    if missing:
        raise BuildError(f"{folder} cannot be finished here: {'; and '.join(missing)}; then: moedge build {folder}")


def _find_package_fault(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the TensorRT that is installed, and what mends it."""
    package, minimum = str(manifest["package"]), str(manifest["package_minimum"])
    if importlib.util.find_spec(package) is None:
        return (
            f"the Python package '{package}' (TensorRT {minimum} or later) is not installed; on a Jetson it comes with "
            "JetPack (sudo apt install nvidia-jetpack python3-libnvinfer, in a venv made with --system-site-packages), "
            "elsewhere: pip install 'moedge[tensorrt]'"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # installed by other means than a package; the builder will say what it cannot do
    if _numbers(version) < _numbers(minimum):
        return (
            f"TensorRT {version} is installed, and this network needs {minimum} or later (the in-place cache layer "
            "came with it); update JetPack or install that version"
        )
    return None


def _find_gpu_fault(manifest: dict[str, Any], capability: tuple[int, int]) -> str | None:
    if _is_here(capability):
        return None
    gpus = [f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in machine.gpus()]
    return (
        f"it is for {manifest['device']} (compute capability {_dotted(capability)}) and this machine has "
        f"{', '.join(gpus) or 'no GPU with a driver'}: TensorRT builds only for the GPU at hand; copy the folder to "
        "the device"
    )


def _is_here(capability: tuple[int, int]) -> bool:
    return any(gpu.compute_capability == capability for gpu in machine.gpus())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _dotted(parts: tuple[int, int]) -> str:
    return f"{parts[0]}.{parts[1]}"

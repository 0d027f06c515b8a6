"""`moedge.build`: bundle and device profile in, engine out, under BUNDLE/engines/PROFILE/."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import (
    ENGINE_MANIFEST,
    FORMAT,
    MODEL,
    WEIGHTS,
    Bundle,
    Progress,
    file_entry,
    find_faults,
    read_json,
    sealed,
    staged_directory,
    write_json,
)
from ..errors import BuildError, UsageError
from ..runtime import machine
from .device import DeviceProfile, load_profile
from .estimate import check_kv_cache
from .fit import Fit, check_fit, size
from .plan import BuildPlan, for_engines, plan_engines
from .shape import cache_element_bytes
from .targets import BuildRequest, check_takes, find_target, pick_target

BUILD_FOLDER_MANIFEST = "build.json"
DEFAULT_MAX_SEQ_LEN = 4096
PORTABLE_TARGET = "tensorrt_rtx"


@dataclass(frozen=True)
class BuildOptions:
    """What a build can be asked for; `build` says what each means."""

    backend: str | None = None
    max_batch: int = 1
    max_seq_len: int | None = None
    max_memory: int | None = None
    prefill_chunk: int | None = None
    expert_buckets: bool = False
    kv_cache: str | None = None
    latent_attention: str = "auto"
    precision: str | None = None

    def request(self, bundle: Bundle, devices: Sequence[DeviceProfile], max_seq_len: int) -> BuildRequest:
        """The same for a target: devices that one engine serves, and the room that was settled on."""
        settled = {"backend", "max_seq_len"}
        asked = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in settled}
        return BuildRequest(bundle, devices[0], max_seq_len=max_seq_len, also=tuple(devices[1:]), **asked)


def build(
    bundle: str | os.PathLike[str],
    profile: str | os.PathLike[str] | DeviceProfile,
    *,
    backend: str | None = None,
    max_batch: int = 1,
    max_seq_len: int | None = None,
    max_memory: int | None = None,
    prefill_chunk: int | None = None,
    expert_buckets: bool = False,
    kv_cache: str | None = None,
    latent_attention: str = "auto",
    precision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build an engine for a device; returns its folder. An engine that was there is replaced when the new one is whole.

    Args:
        bundle: what `moedge.export` wrote.
        profile: a profile's name, a TOML file, or a loaded profile.
        backend: a target other than the profile's own (`moedge.profiles.targets.list_targets()`).
        max_batch: sequences that run at once.
        max_seq_len: tokens of prompt and answer together; the model's own limit up to 4096 unless given.
        max_memory: bytes that building may take: TensorRT's network is then cut into ranges of layers.
        prefill_chunk: the most tokens that a run of a TensorRT engine takes (256).
        expert_buckets: of a load-aware bundle: a chunk's experts work on buckets of what the gate lets them have.
        kv_cache: the type of the KV cache on a CPU: fp32, fp16 or int8. By itself int8 beside int4 and int8 weights
            where moedge's own kernels run (fp16 for an MLA latent in blocks below 32 channels), else fp32.
        latent_attention: absorbed (a small cache) or expanded (a cache by head, and TensorRT's attention kernels);
            auto: expanded where the device holds it.
        precision: fp8 quantizes the weights again, for GPUs of compute capability 8.9 and later; None: the bundle's.
        progress: called with (what, done, total).

    Raises:
        BundleError: the bundle is missing or damaged.
        ProfileError: the profile is unknown or wrong.
        BuildError: it does not fit the device, or the target's builder refused or failed.
    """
    options = BuildOptions(
        backend,
        max_batch,
        max_seq_len,
        max_memory,
        prefill_chunk,
        expert_buckets,
        kv_cache,
        latent_attention,
        precision,
    )
    return build_with(bundle, profile, options, progress)


def build_with(
    bundle: str | os.PathLike[str],
    profile: str | os.PathLike[str] | DeviceProfile,
    options: BuildOptions,
    progress: Progress | None = None,
) -> Path:
    """`build`, with what is asked for in one object."""
    (folder,) = _build_for(Bundle.open(bundle), [_load(profile)], options, progress)
    return folder


def build_portable(
    bundle: str | os.PathLike[str],
    profiles: Sequence[str | os.PathLike[str] | DeviceProfile],
    options: BuildOptions,
    progress: Progress | None = None,
) -> list[Path]:
    """Build one engine that runs on all these devices; returns a folder for each, whose files are links to one copy.

    Exceptions as of `build`; all devices must be of target tensorrt_rtx.
    """
    devices = [_load(profile) for profile in profiles]
    for device in devices:
        target = retarget(device, options.backend).target
        if target != PORTABLE_TARGET:
            raise BuildError(
                f"--portable makes one engine of target {PORTABLE_TARGET}, and {device.name} is built by "
                f"{target}; build for it by itself: --profile {device.name}"
            )
    return _build_for(Bundle.open(bundle), devices, options, progress)


def _load(profile: str | os.PathLike[str] | DeviceProfile) -> DeviceProfile:
    return profile if isinstance(profile, DeviceProfile) else load_profile(profile)


def _build_for(
    bundle: Bundle, devices: list[DeviceProfile], options: BuildOptions, progress: Progress | None
) -> list[Path]:
    """One engine for all `devices`, in the first one's folder and linked into the others'."""
    devices = [retarget(device, options.backend) for device in devices]
    name = devices[0].target
    target = find_target(name)
    check_takes(bundle, name)
    length, max_batch = pick_max_seq_len(bundle, options.max_seq_len), options.max_batch
    fits = [check_build_fit(bundle, device, max_batch, length, options.kv_cache) for device in devices]
    request = options.request(bundle, devices, length)
    for fit in fits:
        if not fit.fits:
            raise BuildError(fit.explain())
    check_sources(bundle)
    started = time.monotonic()
    known = machine.reset_peak_memory()  # else the peak is of whatever this process did before
    with contextlib.ExitStack() as stack:
        folders = [bundle.engine_dir(device.name) for device in devices]
        staged = [stack.enter_context(staged_directory(each, force=True, error=BuildError)) for each in folders]
        fields = target.build(request, staged[0], progress)
        peak = max(fields.get("peak_build_memory_bytes") or 0, (machine.peak_memory_bytes() or 0) if known else 0)
        _check_memory_bound(fields["status"], peak, options.max_memory)
        document = {
            "format": FORMAT,
            "target": name,
            **fields,
            **_describe_model(bundle),
            "build_seconds": round(time.monotonic() - started, 3),
            "peak_build_memory_bytes": peak or None,
        }
        for device, fit, folder in zip(devices, fits, staged, strict=True):
            if folder is not staged[0]:
                _link_files(staged[0], folder)
            fit = for_engines(fit, bundle.manifest, device, len(document["session"].get("parts", ())))
            own: dict[str, Any] = {"profile": device.name, "fit": fit.to_json()}
            if device.compute_capability is not None and document["compute_capability"] is not None:
                own["compute_capability"] = list(device.compute_capability)
            own["fit_built"] = _check_built(bundle, device, document, max_batch)
            write_engine_manifest(folder, document | own)
    return folders


def _check_built(
    bundle: Bundle, device: DeviceProfile, document: dict[str, Any], max_batch: int
) -> dict[str, Any] | None:
    """The fit check again with what the build log says of weights and scratch; None where there is no such log.

    Raises:
        BuildError: the engine needs more than the device has, whatever was estimated.
    """
    memory = document["session"].get("memory")
    if memory is None:
        return None
    fit = check_fit(
        bundle.manifest,
        device,
        max_batch,
        document["max_seq_len"],
        workspace_bytes=max(memory["activation_bytes"], default=0),
        weight_bytes=memory["weights_bytes"],
        cache_bytes_per_token=sum(entry["width"] * np.dtype(entry["dtype"]).itemsize for entry in document["cache"]),
    )
    if not fit.fits:
        raise BuildError(f"by its build log, {fit.explain()}")
    return fit.to_json()


def _check_memory_bound(status: str, peak: int, max_memory: int | None) -> None:
    """What planning could not foresee is held to the bound all the same: after the fact is better than not at all."""
    if max_memory is not None and status == "ready" and peak > max_memory:
        raise BuildError(
            f"--max-memory {size(max_memory)}: building took {size(peak)} and nothing was kept; "
            f"use --max-memory {-(-peak // (1 << 20))}MiB or more"
        )


def _link_files(source: Path, folder: Path) -> None:
    """The same files in another folder: links where the file system has them, copies elsewhere."""
    for path in sorted(source.iterdir()):
        if path.name == ENGINE_MANIFEST:
            continue
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)


def pick_max_seq_len(bundle: Bundle, asked: int | None) -> int:
    """Tokens of room; raises BuildError beyond what the model was made for."""
    limit = int(bundle.config["max_position_embeddings"])
    if asked is None:
        return min(limit, DEFAULT_MAX_SEQ_LEN)
    if not 1 <= asked <= limit:
        raise BuildError(f"max_seq_len {asked}: this model takes 1 to {limit} tokens; use --max-seq-len {limit}")
    return asked


def retarget(device: DeviceProfile, backend: str | None) -> DeviceProfile:
    """The device with the target that builds for it: its own, or the `backend` asked for.

    Raises:
        BuildError: no such target.
    """
    return dataclasses.replace(device, target=pick_target(backend or device.target, device))


def plan(bundle: Bundle, device: DeviceProfile, options: BuildOptions) -> BuildPlan:
    """What `build` would make, and whether it fits; exceptions as of `build`, and nothing is written."""
    device, max_batch = retarget(device, options.backend), options.max_batch
    if max_batch < 1:
        raise BuildError(f"max_batch {max_batch}: at least 1 was expected; use --max-batch 1")
    length = pick_max_seq_len(bundle, options.max_seq_len)
    planned = plan_engines(options.request(bundle, [device], length), device.target, bundle.manifest)
    if options.kv_cache is not None:
        fit = check_build_fit(bundle, device, max_batch, length, options.kv_cache)
        planned = dataclasses.replace(planned, fit=fit)
    return dataclasses.replace(planned, built=_built_fit(bundle, planned.fit))


def _built_fit(bundle: Bundle, fit: Fit) -> dict[str, Any] | None:
    """What the build log of the engine that is there says, where it was built for as much."""
    path = bundle.engine_dir(fit.profile) / ENGINE_MANIFEST
    if not path.is_file():
        return None
    after = read_json(path, BuildError).get("fit_built")
    asked = (fit.max_batch, fit.max_seq_len)
    alike = isinstance(after, dict) and (after.get("max_batch"), after.get("max_seq_len")) == asked
    return after if alike else None


def check_build_fit(
    bundle: Bundle, device: DeviceProfile, max_batch: int, max_seq_len: int, kv_cache: str | None = None
) -> Fit:
    """The fit check that `build` makes first and `--dry-run` prints."""
    if max_batch < 1:
        raise BuildError(f"max_batch {max_batch}: at least 1 was expected; use --max-batch 1")
    element = None
    if kv_cache is not None:
        if bundle.config["attention"]["kind"] == "torch":
            raise BuildError("kv_cache: a PyTorch model's own graph keeps no KV cache; leave --kv-cache out")
        try:
            check_kv_cache(device, kv_cache)
        except UsageError as error:
            raise BuildError(str(error)) from None
        element = cache_element_bytes(bundle.manifest, device.target, kv_cache)
    return check_fit(bundle.manifest, device, max_batch, max_seq_len, cache_bytes_per_element=element)


def check_sources(bundle: Bundle) -> None:
    """The graph and the weights are what the manifest says, so that no engine is made from damaged ones.

    Raises:
        BuildError: names the first damaged file.
    """
    files = {name: entry for name, entry in bundle.manifest["files"].items() if name in (MODEL, WEIGHTS)}
    faults = find_faults(bundle.path, files)
    if faults:
        raise BuildError(f"{faults[0]}: the bundle is damaged; export it again: moedge export ... --force")


def finish_build(folder: Path, progress: Progress | None = None) -> Path:
    """Finish, on the device, a folder that `build` prepared elsewhere; returns the folder.

    Raises:
        BuildError: not such a folder, damaged, or the device's TensorRT is missing.
    """
    settings = read_json(folder / BUILD_FOLDER_MANIFEST, BuildError)
    target: Any = find_target(str(settings.get("target")))
    document = read_json(folder / ENGINE_MANIFEST, BuildError)
    started = time.monotonic()
    document.update(target.finish(folder, progress))
    document["build_seconds"] = round(time.monotonic() - started, 3)
    write_engine_manifest(folder, document)
    return folder


def write_engine_manifest(folder: Path, document: dict[str, Any]) -> None:
    """Write engine.json with the bytes and checksum of every other file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): file_entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ENGINE_MANIFEST
    }
    document["files"] = files
    document["bytes"] = sum(entry["bytes"] for entry in files.values())
    write_json(folder / ENGINE_MANIFEST, sealed(document))


def _describe_model(bundle: Bundle) -> dict[str, Any]:
    """What a session and a report need of the model, so that an engine folder speaks for itself."""
    config, files = bundle.config, bundle.manifest["files"]
    moe = config["moe"]
    return {
        "model": bundle.manifest["model"]["name"],
        "made_from": {name: files[name]["sha256"] for name in (MODEL, WEIGHTS)},
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "moe_layers": moe["layers"],
        "num_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
    }

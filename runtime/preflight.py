"""Preflight: what an engine was built from, for and with, compared with this bundle and this machine before it loads.

Every mismatch is one line that ends with the command that mends it.
"""

from __future__ import annotations

import difflib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import ENGINE_MANIFEST, MODEL, WEIGHTS, Bundle, Progress, read_json, seal_of, sha256_file
from ..errors import EngineError
from . import kernels, machine
from .sessions import Backend, Findings, backend_module

ENGINE_FORMAT = 1

# Files up to this size are hashed at every load (a fraction of a second); larger ones only by `moedge verify`, but for
# plans: they are machine code.
HASHED_AT_LOAD = 64 << 20
_PLAN = ".plan"
# The oldest driver of each CUDA (NVIDIA, CUDA Compatibility, minor version compatibility; Linux).
_OLDEST_DRIVERS = {12: "525", 13: "580"}


@dataclass(frozen=True)
class CacheEntry:
    """One tensor of the KV cache: `width` elements of `dtype` for each token.

    `heads` 0: rows [capacity, width], bound as a view whose rows are cut into `parts`. Else one buffer
    [1, heads, capacity, width / heads].
    """

    name: str
    width: int
    dtype: str
    heads: int = 0
    parts: int = 1


@dataclass(frozen=True)
class EngineInfo:
    """engine.json. What a backend alone knows stands in `session`."""

    profile: str
    target: str
    backend: str
    backend_version: str
    compute_capability: tuple[int, int] | None
    precision: str
    max_batch: int
    max_seq_len: int
    bytes: int
    files: dict[str, dict[str, Any]]
    made_from: dict[str, str]
    status: str
    vocab_size: int = 0
    layers: int = 0
    moe_layers: tuple[int, ...] = ()
    num_experts_per_tok: int = 0
    num_experts: int = 0
    cuda_minimum: int | None = None  # major version of CUDA that the driver must be for
    cache: tuple[CacheEntry, ...] = ()
    session: dict[str, Any] = field(default_factory=dict)
    # Of an engine whose graph of onnxruntime's own ops keeps another cache: that one, and the precision it comes with.
    stock: tuple[str, tuple[CacheEntry, ...]] | None = None

    @property
    def cache_bytes_per_token(self) -> int:
        """What the KV cache takes for a token, all layers."""
        return sum(entry.width * np.dtype(entry.dtype).itemsize for entry in self.cache)

    def by_stock_ops(self) -> EngineInfo:
        """The engine as it runs without our own kernels."""
        return self if self.stock is None else replace(self, precision=self.stock[0], cache=self.stock[1], stock=None)


def read_engine(bundle: Bundle, profile: str) -> EngineInfo:
    """Read engines/`profile`/engine.json: what the graph is like that runs on this machine.

    Raises:
        EngineError: there is no such engine, or its engine.json cannot be read.
    """
    from ..profiles.device import find_name, list_profiles

    known = bundle.engines()
    profile = find_name(profile, known) or find_name(profile, list_profiles()) or profile
    build = f"moedge build {bundle.path} --profile {profile}"
    if profile not in known:
        if find_name(profile, list_profiles()) is None:
            has = f"it has {', '.join(known)}" if known else "it has none"
            near = difflib.get_close_matches(profile, [*known, *list_profiles()], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise EngineError(
                f"{bundle.path} has no engine '{profile}'{meant}, {has}, and no device profile has that name: "
                "moedge profiles lists them"
            )
        if not known:
            raise EngineError(f"{bundle.path} has no engines; build one: {build}")
        raise EngineError(f"{bundle.path} has no engine '{profile}', it has {', '.join(known)}; build it: {build}")
    path = bundle.engine_dir(profile) / ENGINE_MANIFEST
    document = read_json(path, EngineError)
    found = document.get("format")
    if "seal" in document and document["seal"] != seal_of(document):
        raise EngineError(f"{path} was changed since the engine was built; build it again: {build}")
    if found != ENGINE_FORMAT:
        raise EngineError(f"{path}: engine format {found}, this version reads {ENGINE_FORMAT}; build it again: {build}")
    try:
        info = _parse(document)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        what = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise EngineError(f"{path}: not a valid engine.json ({what}); build it again: {build}") from None
    if info.profile != profile:
        raise EngineError(f"{path} is of profile '{info.profile}', not '{profile}'; build it: {build}")
    return info if kernels.library() is not None else info.by_stock_ops()


def choose_profile(bundle: Bundle) -> str:
    """The profile of the best engine that this machine can run; among engines alike, `cpu`.

    Raises:
        EngineError: there is none; says what there is and why each cannot run.
    """
    reasons = []
    for profile in sorted(bundle.engines(), key=lambda name: (name != "cpu", name)):
        try:
            info = read_engine(bundle, profile)
            reason = cannot_run(bundle, info)
        except EngineError as error:
            reason = str(error)
        if reason is None:
            return profile
        reasons.append(reason)
    build = f"moedge build {bundle.path} --profile cpu"
    if not reasons:
        raise EngineError(f"{bundle.path} has no engines; build one: {build}")
    raise EngineError(
        f"no engine in {bundle.path} runs on this machine ({'; '.join(reasons)}); build one that does: {build}"
    )


def cannot_run(bundle: Bundle, info: EngineInfo) -> str | None:
    """Why this machine cannot run the engine whatever its files are; None when it can."""
    label = f"engine '{info.profile}'"
    if info.status != "ready":
        return (
            f"{label} is {info.status}, not built: finish it on the device it is for: "
            f"moedge build {bundle.engine_dir(info.profile)}"
        )
    if info.compute_capability is not None:
        wanted = _dotted(info.compute_capability)
        gpus = machine.gpus()
        if not gpus:
            return f"{label} needs a GPU of compute capability {wanted}, and this machine has no GPU with a driver"
        if info.compute_capability not in [gpu.compute_capability for gpu in gpus]:
            here = ", ".join(f"{gpu.name} ({_dotted(gpu.compute_capability)})" for gpu in gpus)
            return f"{label} needs a GPU of compute capability {wanted}, and this machine has {here}"
        old = _find_old_driver(info)
        if old is not None:
            return f"{label} {old}"
    reason = backend_module(info.backend).cannot_run(info)
    return f"{label} cannot run: {reason}" if reason else None


def _find_old_driver(info: EngineInfo) -> str | None:
    """What is wrong with the driver; None where it is new enough, or nothing is known of it."""
    here = machine.cuda_driver_version()
    if info.cuda_minimum is None or here is None or here[0] >= info.cuda_minimum:
        return None
    return (
        f"needs {_describe_driver(info.cuda_minimum)}, and this machine's is for CUDA {_dotted(here)}: update the "
        "NVIDIA driver"
    )


def _describe_driver(cuda: int) -> str:
    oldest = _OLDEST_DRIVERS.get(cuda)
    return f"a driver for CUDA {cuda}" + (f" ({oldest} or later)" if oldest else "")


def check_engine(bundle: Bundle, info: EngineInfo) -> None:
    """The preflight of a load: everything but the checksums of large files.

    Raises:
        EngineError: the first fault, and how many more there are.
    """
    reason = cannot_run(bundle, info)
    if reason:
        raise EngineError(f"{reason}; {_alternative(bundle, info)}")
    findings = inspect_engine(bundle, info)
    if findings.faults:
        others = len(findings.faults) - 1
        raise EngineError(findings.faults[0] + (f" ({others} more: moedge verify {bundle.path})" if others else ""))


def inspect_engine(
    bundle: Bundle, info: EngineInfo, *, whole: bool = False, progress: Progress | None = None
) -> Findings:
    """All faults of the engine's files, origin and versions; `whole` also hashes large files and asks the backend.

    The bundle's own files are checked likewise unless `whole`: `moedge verify` has hashed them all by then.
    """
    folder = bundle.engine_dir(info.profile)
    label = f"engine '{info.profile}'"
    rebuild = f"build it again: moedge build {bundle.path} --profile {info.profile}"
    findings, backend = Findings(), backend_module(info.backend)
    for fault in _find_unlisted(info, backend):
        findings.faults.append(f"{label}: {fault}; {rebuild}")
    for fault in _find_damage(folder, info, whole, progress):
        findings.faults.append(f"{label}: {fault}; {rebuild}")
    findings.faults += find_strangers(bundle, info)
    for name, entry in bundle.manifest["files"].items() if not whole else ():
        if name in (MODEL, WEIGHTS) and getattr(backend, "OWN_WEIGHTS", False) and not bundle.file(name).exists():
            continue
        damage = _file_fault(bundle.file(name), entry, False, progress)
        if damage:
            findings.faults.append(f"{damage}; export the bundle again: moedge export ... --force")
    _check_version(info, backend, rebuild, findings)
    if whole and info.cuda_minimum is not None and machine.cuda_driver_version() is None:
        driver = _describe_driver(info.cuda_minimum)
        findings.unchecked.append(f"{label}: the driver ({driver} is needed; none is here)")
    if whole and not findings.faults and info.status == "ready":
        deeper = backend.check(folder, info)
        findings.faults += [f"{fault}; {rebuild}" for fault in deeper.faults]
        findings.unchecked += deeper.unchecked
    return findings


def find_strangers(bundle: Bundle, info: EngineInfo) -> list[str]:
    """For each file of the bundle that an engine was made from and that is another one now, what to say."""
    files = bundle.manifest["files"]
    return [
        f"engine '{info.profile}' was made from another {name} than this bundle's; build it again: moedge build "
        f"{bundle.path} --profile {info.profile}"
        for name, digest in info.made_from.items()
        if name not in files or files[name]["sha256"] != digest
    ]


def _find_unlisted(info: EngineInfo, backend: Backend) -> list[str]:
    """What engine.json does not vouch for: a file that would be loaded without a checksum, an origin left out."""
    strange = [name for name in info.files if not _is_plain(name)]
    faults = [f"engine.json names {name!r}, which is no file of its folder" for name in strange]
    loaded = backend.loads(info) if info.status == "ready" else []
    faults += [f"engine.json has no checksum of {name}" for name in loaded if name not in info.files]
    unknown = [name for name in (MODEL, WEIGHTS) if name not in info.made_from]
    faults += [f"engine.json does not say which {name} it was made from" for name in unknown]
    return faults


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\\" not in name


def _find_damage(
    folder: Path, info: EngineInfo, whole: bool, progress: Progress | None
) -> list[str]:
    """Faults of the engine's files; plans are hashed side by side."""
    names = [name for name in info.files if _is_plain(name)]

    def look(name: str) -> str | None:
        deep = whole or name.endswith(_PLAN)
        return _file_fault(folder / name, info.files[name], deep, progress if whole else None)

    with ThreadPoolExecutor(min(8, max(1, len(names)))) as pool:
        return [fault for fault in pool.map(look, names) if fault]


def _check_version(info: EngineInfo, backend: Backend, rebuild: str, findings: Findings) -> None:
    if info.status != "ready":
        return  # its device's own version will build it
    here = backend.version()
    if here is None:
        findings.unchecked.append(
            f"engine '{info.profile}': its version ({info.backend} {info.backend_version}; none is installed)"
        )
    elif here != info.backend_version:
        findings.faults.append(
            f"engine '{info.profile}' was built with {info.backend} {info.backend_version}, "
            f"and {here} is installed; {rebuild}"
        )


def _file_fault(path: Path, entry: dict[str, Any], whole: bool, progress: Progress | None) -> str | None:
    fault = _size_fault(path, entry)
    if fault:
        return fault
    if (whole or entry["bytes"] <= HASHED_AT_LOAD) and sha256_file(path, progress) != entry["sha256"]:
        return f"{path} is damaged (its checksum is not the one it was made with)"
    return None


def _size_fault(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return f"{path} has {size} bytes instead of {entry['bytes']}" if size != entry["bytes"] else None


def _alternative(bundle: Bundle, info: EngineInfo) -> str:
    """What the user can do instead on this machine."""
    runnable = []
    for profile in bundle.engines():
        try:
            other = read_engine(bundle, profile)
            if cannot_run(bundle, other) is None:
                runnable.append(profile)
        except EngineError:
            continue
    if runnable:
        return f"what runs here: {', '.join(runnable)} (--profile {runnable[0]})"
    return f"build one that runs here: moedge build {bundle.path} --profile cpu"


def _parse(document: dict[str, Any]) -> EngineInfo:
    capability = document["compute_capability"]
    session = dict(document.get("session", {}))
    _count(session, "lanes", 1)
    stock = document.get("stock")
    files = {str(name): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in document["files"].items()}
    return EngineInfo(
        profile=str(document["profile"]),
        target=str(document["target"]),
        backend=str(document["backend"]),
        backend_version=str(document["backend_version"]),
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        precision=str(document["precision"]),
        max_batch=_count(document, "max_batch", least=1),
        max_seq_len=_count(document, "max_seq_len", least=1),
        bytes=int(document["bytes"]),
        files=files,
        made_from={str(name): str(digest) for name, digest in document["made_from"].items()},
        status=str(document["status"]),
        vocab_size=_count(document, "vocab_size", 0),
        layers=_count(document, "layers", 0),
        moe_layers=tuple(int(layer) for layer in document.get("moe_layers", [])),
        num_experts_per_tok=_count(document, "num_experts_per_tok", 0),
        num_experts=_count(document, "num_experts", 0),
        cuda_minimum=None if document.get("cuda_minimum") is None else int(document["cuda_minimum"]),
        cache=_cache_entries(document),
        session=session,
        stock=None if stock is None else (str(stock["precision"]), _cache_entries(stock)),
    )


def _count(document: dict[str, Any], name: str, default: int | None = None, least: int = 0) -> int:
    value = document[name] if default is None else document.get(name, default)
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{name} is {str(value)[:20]}")
    return value


def _cache_entries(document: dict[str, Any]) -> tuple[CacheEntry, ...]:
    return tuple(_cache_entry(entry) for entry in document.get("cache", []))


def _cache_entry(entry: dict[str, Any]) -> CacheEntry:
    counts = int(entry.get("heads", 0)), int(entry.get("parts", 1))
    parsed = CacheEntry(str(entry["name"]), int(entry["width"]), str(entry["dtype"]), *counts)
    if parsed.parts < 1 or parsed.width % parsed.parts:
        raise ValueError(f"cache entry {parsed.name} has width {parsed.width} in {parsed.parts} parts")
    if parsed.width <= 0 or parsed.heads < 0 or (parsed.heads and parsed.width % parsed.heads):
        raise ValueError(f"cache entry {parsed.name} has width {parsed.width} and {parsed.heads} heads")
    np.dtype(parsed.dtype)  # TypeError: no such type
    return parsed


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

"""Device profiles: one TOML file a device, each figure with its source.

Shipped ones lie in `devices/`; a user's own in `~/.config/moedge/profiles/` (or `$XDG_CONFIG_HOME/moedge/profiles/`),
where a file of the same name replaces the shipped one, or anywhere when named by its path.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ProfileError, shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("gpu", "jetson", "cpu")
TARGETS = ("onnxruntime", "onnxruntime_cuda", "tensorrt_rtx", "tensorrt")
PRECISIONS = ("fp32", "fp16", "int8", "fp8", "fp4")

_SHIPPED = Path(__file__).parent / "devices"
_ASSUMPTION = "assumption"


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What is known of a device; `sources` says of each figure where it is from.

    `memory_reserved_bytes`: what the driver and the operating system keep. `memory_shared`: the CPU lives in the same
    memory. `flops`: dense operations per second by precision. `launch_overhead_us`: the fixed cost of one kernel (GPU)
    or graph node (CPU). `cache_bytes`: the last cache before memory, where a small model's weights stay.
    `this_machine`: cores, cache, memory and flops were read from the machine that loaded the profile.
    """

    name: str
    title: str
    vendor: str
    kind: str
    target: str
    as_of: str
    memory_bytes: int
    memory_reserved_bytes: int
    bandwidth_bytes_per_s: float
    flops: Mapping[str, float]
    launch_overhead_us: float
    compute_capability: tuple[int, int] | None = None
    memory_shared: bool = False
    this_machine: bool = False
    cores: int | None = None
    cache_bytes: int | None = None
    power_w: float | None = None
    price_usd_per_hour: float | None = None
    notes: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    @property
    def available_bytes(self) -> int:
        """Memory that an engine can have."""
        return self.memory_bytes - self.memory_reserved_bytes

    def is_assumption(self, figure: str) -> bool:
        """Whether a figure (a key of `sources`) is assumed rather than published."""
        return self.sources.get(figure, _ASSUMPTION).startswith(_ASSUMPTION)

    def figures(self) -> dict[str, Any]:
        """Every figure that is known, by the name it has in `sources`."""
        keys = (
            "compute_capability cores cache_bytes memory_bytes memory_reserved_bytes bandwidth_bytes_per_s power_w "
            "price_usd_per_hour launch_overhead_us"
        ).split()
        known = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return known | dict(self.flops)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        document |= {"flops": dict(self.flops), "sources": dict(self.sources), "path": self.path and str(self.path)}
        if self.compute_capability is not None:
            document["compute_capability"] = list(self.compute_capability)
        return document

    def with_bandwidth(self, bytes_per_s: float, source: str) -> DeviceProfile:
        """The same device with a bandwidth that somebody measured."""
        sources = {**self.sources, "bandwidth_bytes_per_s": source}
        return dataclasses.replace(self, bandwidth_bytes_per_s=bytes_per_s, sources=sources)


def user_profiles_folder() -> Path:
    """Where a user's own profiles lie."""
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "moedge" / "profiles"


def plain_name(name: str) -> str:
    """A profile's name without what spellings differ in: rtx4090 for RTX-4090 and rtx_4090."""
    return re.sub(r"[-_ ]", "", name.lower())


def find_name(name: str, known: Iterable[str]) -> str | None:
    """`name` as the `known` spell it, or the only one of which it is some whole words (orin-nx); None where it is none
    of them: h20 is no h200."""
    names, plain = list(known), plain_name(name)
    if name in names:
        return name
    alike = [each for each in names if plain and plain_name(each) == plain] or [
        each for each in names if f" {_words(name)} " in f" {_words(each)} "
    ]
    return alike[0] if len(alike) == 1 else None


def _words(name: str) -> str:
    """Its runs of letters and of digits."""
    return " ".join(re.findall(r"[a-z]+|[0-9]+", name.lower()))


def list_profiles() -> list[str]:
    """Names of all profiles that `load_profile` finds by name, sorted."""
    return sorted(_files())


def load_profile(name_or_path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile of that name (rtx-4090 finds rtx4090, orin-nx jetson-orin-nx-16gb), or in that TOML file (a path, or
    what ends in .toml). By its name it has that name, whatever the file says.

    Raises:
        ProfileError: no such profile (lists the known), or a file that is no profile (names file and key).
    """
    text = os.fspath(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        return read_profile(Path(text))
    files = _files()
    found = find_name(text, files)
    if found is None:
        near = [each for each in files if plain_name(text) and plain_name(text) in plain_name(each)]
        near = sorted(near) or difflib.get_close_matches(text, files, n=1)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ProfileError(
            f"unknown profile {shorten(text)}{meant}; known: {', '.join(sorted(files))}; "
            f"add your own as {user_profiles_folder() / (text + '.toml')} or name a path that ends in .toml"
        )
    return dataclasses.replace(read_profile(files[found]), name=found)


def read_profile(path: Path) -> DeviceProfile:
    """The profile in a TOML file.

    Raises:
        ProfileError: unreadable, not TOML, keys unknown or missing, or a figure that makes no sense.
    """
    try:
        with path.open("rb") as stream:
            document = tomllib.load(stream)
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file; `moedge profiles` lists the known profiles") from None
    except OSError as cause:
        raise ProfileError(f"{path}: not readable ({cause.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise ProfileError(f"{path}: not readable as TOML ({str(cause).splitlines()[0][:200]})") from None
    except ValueError:  # int() refuses thousands of digits
        raise ProfileError(f"{path}: not readable as TOML (a number of thousands of digits)") from None
    profile = _profile_from_toml(document, path)
    return _fill_from_machine(profile) if profile.this_machine else profile


def _files() -> dict[str, Path]:
    found = {path.stem: path for path in _SHIPPED.glob("*.toml")}
    return found | {path.stem: path for path in user_profiles_folder().glob("*.toml")}


def _fill_from_machine(profile: DeviceProfile) -> DeviceProfile:
    """cores, memory and flops of the machine at hand in place of the file's defaults."""
    from ..runtime import machine

    cores, memory = machine.default_threads(), machine.memory_bytes()
    scale = cores / (profile.cores or cores)
    sources = {**profile.sources, "cores": "read from this machine"}
    if memory is not None:
        sources["memory_bytes"] = "read from this machine"
    cache = machine.last_level_cache_bytes()
    if cache is not None:
        sources["cache_bytes"] = "read from this machine"
    return dataclasses.replace(
        profile,
        cache_bytes=cache,
        title=machine.cpu_name(),
        cores=cores,
        memory_bytes=memory if memory is not None else profile.memory_bytes,
        # A container of 512 MiB has no GiB for an operating system that runs outside it.
        memory_reserved_bytes=min(profile.memory_reserved_bytes, (memory or profile.memory_bytes) // 8),
        flops={precision: rate * scale for precision, rate in profile.flops.items()},
        sources=sources,
    )


@dataclass(frozen=True)
class _Range:
    """Figures outside low..high are a slip (a wrong unit, a sign, a word), whatever the device."""

    low: float
    high: float
    unit: str
    whole: bool = False


_RANGES = {
    "cores": _Range(1, 4096, "cores", whole=True),
    "cache_bytes": _Range(2**16, 2**34, "bytes", whole=True),
    "memory_bytes": _Range(2**26, 2**44, "bytes", whole=True),
    "memory_reserved_bytes": _Range(0, 2**42, "bytes", whole=True),
    "bandwidth_bytes_per_s": _Range(1e8, 1e14, "bytes/s"),
    "power_w": _Range(0.1, 20_000, "watts"),
    "price_usd_per_hour": _Range(0, 1_000, "USD/h"),
    "launch_overhead_us": _Range(0, 1_000, "microseconds"),
}
_OPERATIONS_PER_BYTE = (1, 20_000)  # of the narrowest kind; shipped devices have 10 to 4,000
_LINE = re.compile(r"[^\x00-\x1f\ud800-\udfff]{1,1000}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DATE = re.compile(r"20\d\d(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?")
_FLOPS_RANGE = _Range(1e8, 1e17, "operations/s")
_TEXTS = ("name", "title", "vendor", "kind", "target", "as_of", "notes")
_FLAGS = ("memory_shared", "this_machine")
_REQUIRED = (
    "name title vendor kind target as_of memory_bytes memory_reserved_bytes bandwidth_bytes_per_s launch_overhead_us "
    "flops"
).split()


def _profile_from_toml(document: dict[str, Any], path: Path) -> DeviceProfile:
    known = {*_RANGES, *_TEXTS, *_FLAGS, "compute_capability", "flops", "sources"}
    unknown = sorted(set(document) - known)
    if unknown:
        raise ProfileError(f"{path}: unknown key {shorten(unknown[0])}; known: {', '.join(sorted(known))}")
    missing = [key for key in _REQUIRED if key not in document]
    if missing:
        raise ProfileError(f"{path}: {', '.join(missing)} missing; {_SHIPPED / 'rtx4090.toml'} is an example")
    fields: dict[str, Any] = {key: _text(path, key, document[key]) for key in _TEXTS if key in document}
    fields |= {key: _flag(path, key, document[key]) for key in _FLAGS if key in document}
    fields |= {key: _figure(path, key, document[key], _RANGES[key]) for key in _RANGES if key in document}
    fields["flops"] = _flops(path, document["flops"])
    fields["sources"] = _sources(path, document.get("sources", {}))
    if "compute_capability" in document:
        fields["compute_capability"] = _compute_capability(path, document["compute_capability"])
    profile = DeviceProfile(**fields, path=path)
    _check_together(profile, path)
    return profile


def _check_together(profile: DeviceProfile, path: Path) -> None:
    """Figures that are each plausible and contradict one another."""
    if not _NAME.fullmatch(profile.name):
        raise ProfileError(
            f"{path}: name is {shorten(profile.name)}; letters, digits, dots and dashes were expected"
        )
    if not _DATE.fullmatch(profile.as_of):
        raise ProfileError(f"{path}: as_of is {shorten(profile.as_of)}; a month or day was expected, such as 2026-11")
    if profile.kind not in KINDS:
        raise ProfileError(f"{path}: kind is {shorten(profile.kind)}; known: {', '.join(KINDS)}")
    if profile.target not in TARGETS:
        raise ProfileError(f"{path}: target is {shorten(profile.target)}; known: {', '.join(TARGETS)}")
    if profile.memory_reserved_bytes >= profile.memory_bytes:
        raise ProfileError(
            f"{path}: memory_reserved_bytes ({profile.memory_reserved_bytes}) leaves nothing of memory_bytes "
            f"({profile.memory_bytes})"
        )
    if profile.kind != "cpu" and profile.compute_capability is None:
        raise ProfileError(f"{path}: compute_capability is missing; a {profile.kind} needs it, for example [8, 9]")
    if "fp32" not in profile.flops:
        raise ProfileError(f"{path}: flops.fp32 is missing; the other precisions may be left out")
    if profile.flops.get("fp16", math.inf) < profile.flops["fp32"]:
        raise ProfileError(f"{path}: flops.fp16 is below flops.fp32; give dense tensor-core figures in operations/s")
    per_byte = max(profile.flops.values()) / profile.bandwidth_bytes_per_s
    if not _OPERATIONS_PER_BYTE[0] <= per_byte <= _OPERATIONS_PER_BYTE[1]:
        raise ProfileError(
            f"{path}: flops and bandwidth_bytes_per_s make {per_byte:.3g} operations for a byte, no device has fewer "
            f"than {_OPERATIONS_PER_BYTE[0]} or more than {_OPERATIONS_PER_BYTE[1]:,}; one of them is in another unit"
        )
    strange = sorted(set(profile.sources) - {*_RANGES, *PRECISIONS, "compute_capability"})
    if strange:
        raise ProfileError(f"{path}: sources.{strange[0][:80]} belongs to no figure of a profile")


def _flops(path: Path, table: Any) -> dict[str, float]:
    if not isinstance(table, dict):
        raise ProfileError(f"{path}: flops is {shorten(table)}, a table of operations/s by precision was expected")
    unknown = sorted(set(table) - set(PRECISIONS))
    if unknown:
        raise ProfileError(f"{path}: unknown precision flops.{unknown[0][:80]}; known: {', '.join(PRECISIONS)}")
    return {key: _figure(path, f"flops.{key}", value, _FLOPS_RANGE) for key, value in table.items()}


def _sources(path: Path, table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        raise ProfileError(f"{path}: sources is {shorten(table)}, a table [sources] of texts by figure was expected")
    return {key: _text(path, f"sources.{key}", value) for key, value in table.items()}


def _figure(path: Path, key: str, value: Any, allowed: _Range) -> Any:
    number = not isinstance(value, bool) and isinstance(value, int if allowed.whole else (int, float))
    if not number or not allowed.low <= value <= allowed.high:
        kind = "a whole number" if allowed.whole else "a number"
        span = f"from {allowed.low:g} to {allowed.high:g}"
        raise ProfileError(f"{path}: {key} is {shorten(value)}; {kind} of {allowed.unit} {span} was expected")
    return value if allowed.whole else float(value)


def _compute_capability(path: Path, value: Any) -> tuple[int, int]:
    whole = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
    if not whole or not 5 <= value[0] <= 20 or not 0 <= value[1] <= 9:
        told = f"compute_capability is {shorten(value)}; [major, minor] was expected, for example [8, 9]"
        raise ProfileError(f"{path}: {told}")
    return value[0], value[1]


def _typed(kind: type, words: str) -> Callable[[Path, str, Any], Any]:
    def check(path: Path, key: str, value: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, str) and not _LINE.fullmatch(value)):
            raise ProfileError(f"{path}: {key} is {shorten(value)}; {words} was expected")
        return value

    return check


_text = _typed(str, "a text")
_flag = _typed(bool, "true or false")

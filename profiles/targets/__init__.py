"""One file per target: what turns a canonical bundle into an engine for one backend."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ...bundle import Bundle, Progress
from ...errors import BuildError
from ..device import DeviceProfile

if TYPE_CHECKING:
    from ...runtime.preflight import EngineInfo
    from ._routes import Traced


@dataclass(frozen=True)
class BuildRequest:
    """What to build: a bundle's model for a device, with room for `max_batch` sequences of `max_seq_len` tokens.

    `also`: devices that the same engine is to serve. `max_memory`: bytes that building may take; None for no bound.
    Of TensorRT's network: `prefill_chunk`, the most tokens of a run, None for the target's own choice;
    `expert_buckets`, a chunk's experts work on buckets of bounded size.
    `kv_cache`: one of the target's KV_CACHES (../shape.py); None for what it does anyway.
    `latent_attention`: absorbed, expanded, or auto: a target that has both chooses. `precision` fp8: weights are
    quantized again, where a target has it; None: as the bundle has them.
    """

    bundle: Bundle
    device: DeviceProfile
    max_batch: int
    max_seq_len: int
    also: tuple[DeviceProfile, ...] = ()
    max_memory: int | None = None
    prefill_chunk: int | None = None
    expert_buckets: bool = False
    kv_cache: str | None = None
    latent_attention: str = "auto"
    precision: str | None = None

    @property
    def devices(self) -> tuple[DeviceProfile, ...]:
        return (self.device, *self.also)


class Target(Protocol):
    """What a target's module offers."""

    def build(self, request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
        """Write the engine's files into `folder` and return engine.json's own fields.

        The fields: backend, backend_version, compute_capability, precision, status ("ready" or "prepared"), max_batch,
        max_seq_len, cache [{name, width, dtype}], session {what this backend's session needs}.

        Raises:
            BuildError: this device or model is beyond the target, or its builder failed.
        """

    def trace_routes(self, bundle: Bundle, info: EngineInfo, tokens: Any, layers: int) -> Traced:
        """Which experts the engine chooses for `tokens` int64 [T], at least in its first `layers` layers.

        Raises:
            EngineError: it does not load, or a router gives NaN.
        """


class PlanningTarget(Target, Protocol):
    """What a target's module offers beside, where building takes memory that is worth planning."""

    def plan(self, request: BuildRequest) -> list[dict[str, Any]]:
        """The engines that `build` would make: layers [start, stop], weights_bytes, build_memory_bytes of each.

        Raises what `build` raises before it builds.
        """


def plan_build(name: str, request: BuildRequest) -> list[dict[str, Any]]:
    """What `PlanningTarget.plan` says of a target that plans; nothing of one that does not.

    Raises:
        BuildError: the target is unknown, or it refuses.
    """
    target = find_target(name)
    check_takes(request.bundle, name)
    planned: list[dict[str, Any]] = cast(PlanningTarget, target).plan(request) if hasattr(target, "plan") else []
    return planned


def check_takes(bundle: Bundle, name: str) -> None:
    """Refuse a torch model's own graph where the target builds from a family's config.

    Raises:
        BuildError: the target has no `TAKES_TORCH_GRAPHS`.
    """
    if bundle.config.get("family") == "torch" and not getattr(find_target(name), "TAKES_TORCH_GRAPHS", False):
        raise BuildError(
            f"{bundle.path} holds a PyTorch model's own graph, of which only onnxruntime on the CPU makes an engine; "
            f"build that: moedge build {bundle.path} --profile cpu"
        )


def list_targets() -> list[str]:
    """The names that a device profile may give as its target."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if not name.startswith("_") and not name.startswith("tensorrt_network"))


def pick_target(name: str, device: DeviceProfile) -> str:
    """The target that builds for `device` where `name` is asked for: a target may name another for GPUs, ON_GPU.

    Raises:
        BuildError: no such target.
    """
    on_gpu = getattr(find_target(name), "ON_GPU", None)
    return on_gpu if on_gpu is not None and device.compute_capability is not None else name


def find_target(name: str) -> Target:
    """The module of a target; raises BuildError for an unknown one, listing the known."""
    known = list_targets()
    if name not in known:
        raise BuildError(f"target {name!r} is not known; known: {', '.join(known)}")
    target: Target = importlib.import_module(f".{name}", __name__)
    return target

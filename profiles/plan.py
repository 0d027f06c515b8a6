"""What a build would make, before it is made: the fit check, and the engines with what building each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .device import DeviceProfile
from .fit import Fit, check_fit, size
from .targets import BuildRequest, plan_build

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class BuildPlan:
    """`parts`: the engines in order, layers [start, stop], weights_bytes and build_memory_bytes (estimated) of each.

    Empty where a target says nothing of it. `built`: the fit as the log of the engine that is there gives it.
    """

    fit: Fit
    target: str
    parts: list[dict[str, Any]]
    max_memory: int | None = None
    built: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Every figure in bytes."""
        document = self.fit.to_json() | {"target": self.target, "parts": self.parts, "built": self.built}
        return document | {"max_memory_bytes": self.max_memory}


def plan_engines(request: BuildRequest, target: str, manifest: Mapping[str, Any]) -> BuildPlan:
    """The plan for `request.device`, whose `target` is `target`.

    Raises:
        BuildError: the target refuses this device or size, or the bound is below what one layer needs.
    """
    parts = plan_build(target, request)
    cache = sum(part["cache_bytes_per_token"] for part in parts) if parts else None
    asked = (manifest, request.device, request.max_batch, request.max_seq_len)
    fit = check_fit(*asked, cache_bytes_per_token=cache)
    fit = for_engines(fit, manifest, request.device, len(parts))
    return BuildPlan(fit, target, parts, request.max_memory)


def for_engines(fit: Fit, manifest: Mapping[str, Any], device: DeviceProfile, engines: int) -> Fit:
    """The same fit where the model is cut into several engines: each has activations of its own."""
    if engines < 2:
        return fit
    return check_fit(
        manifest,
        device,
        fit.max_batch,
        fit.max_seq_len,
        workspace_bytes=engines * fit.workspace_bytes,
        cache_bytes_per_token=fit.cache_bytes // (fit.max_batch * fit.max_seq_len),
    )


def parts_table(plans: list[BuildPlan]) -> Table | None:
    """The engines of all plans as rows; None where there are none to show."""
    from rich.table import Table

    table = Table(title="Engines to build", title_justify="left")
    table.add_column("profile")
    table.add_column("layers")
    for heading in ("weights", "building takes", "workspace"):
        table.add_column(heading, justify="right")
    for plan in plans:
        for part in plan.parts:
            table.add_row(
                plan.fit.profile,
                f"{part['layers'][0]} to {part['layers'][1] - 1}",
                size(part["weights_bytes"]),
                size(part["build_memory_bytes"]),
                size(plan.fit.workspace_bytes / len(plan.parts)),
            )
    return table if table.row_count else None


def explain_parts(plan: BuildPlan) -> str | None:
    """One line on the memory that building takes, and how to bound it."""
    if not plan.parts:
        return None
    most = max(part["build_memory_bytes"] for part in plan.parts)
    name = plan.fit.profile
    if plan.max_memory is not None:
        count = "one engine" if len(plan.parts) == 1 else f"{len(plan.parts)} engines"
        return f"{name}: {count}, built in at most {size(plan.max_memory)} (estimated: {size(most)})"
    return f"{name}: building takes about {size(most)}; --max-memory SIZE cuts it into engines by layers that take less"

"""Does a model fit a device: weights, KV cache, workspace and runtime against memory, and what to change when not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ProfileError
from .advice import Suggestion, narrower_weights, suggest
from .device import DeviceProfile, list_profiles, load_profile
from .shape import ELEMENT_BYTES, ModelShape, cache_element_bytes

# Assumptions. The prompt goes through in chunks of this many tokens; only one chunk's activations are alive.
PREFILL_CHUNK = 256
# What the process and its libraries take beside the model: the CUDA context and TensorRT's libraries, or onnxruntime's.
RUNTIME_BYTES = {"gpu": 600 << 20, "jetson": 900 << 20, "cpu": 200 << 20}
# Scratch beyond the large activations. TensorRT's build log says, for one layer of Qwen3-30B-A3B and of
# DeepSeek-V2-Lite at chunks of 256 to 1024 tokens, between 0.95 and 0.99 times what these two make of it.
_SCRATCH_FACTOR, _SCRATCH_BYTES = 1.04, 8 << 20


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The memory a model needs on a device at `max_batch` sequences of up to `max_seq_len` tokens, in bytes."""

    model: str
    profile: str
    device: str
    max_batch: int
    max_seq_len: int
    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    memory_bytes: int
    reserved_bytes: int
    suggestions: tuple[Suggestion, ...] = ()
    devices_that_fit: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes + self.runtime_bytes

    @property
    def available_bytes(self) -> int:
        return self.memory_bytes - self.reserved_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available_bytes

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for a table, the sum and the room last."""
        return [
            ("weights", self.weight_bytes, "all experts, scales included"),
            ("KV cache", self.cache_bytes, f"{self.max_batch} x {self.max_seq_len} tokens"),
            ("workspace", self.workspace_bytes, f"estimated, prompt in chunks of {PREFILL_CHUNK} tokens"),
            ("runtime", self.runtime_bytes, "libraries and context, assumed"),
            ("needed", self.total_bytes, ""),
            ("available", self.available_bytes, f"of {size(self.memory_bytes)}, {size(self.reserved_bytes)} reserved"),
        ]

    def explain(self) -> str:
        """One line: whether it fits, the figures, and when not, what to change."""
        need = (
            f"needs {size(self.total_bytes)} (weights {size(self.weight_bytes)}, KV cache {size(self.cache_bytes)} at "
            f"{self.max_batch} x {self.max_seq_len} tokens, workspace {size(self.workspace_bytes)}, runtime "
            f"{size(self.runtime_bytes)}), {self.profile} has {size(self.available_bytes)}"
        )
        if self.fits:
            return f"{self.model} fits {self.profile}: it {need}"
        return f"{self.model} does not fit {self.profile}: it {need}; {self._remedy()}"

    def _remedy(self) -> str:
        if self.suggestions:
            first, *others = [f"{each.option} ({each.change}, {size(each.total_bytes)})" for each in self.suggestions]
            return f"it fits with {first}" + "".join(f", or with {other}" for other in others)
        if self.devices_that_fit:
            return f"no change of weights, context or batch helps; it fits: {', '.join(self.devices_that_fit)}"
        return "no change of weights, context or batch helps, nor a larger known device: take a smaller model"

    def to_json(self) -> dict[str, Any]:
        """Every figure in bytes."""
        names = (
            "model profile device max_batch max_seq_len weight_bytes cache_bytes workspace_bytes runtime_bytes "
            "total_bytes memory_bytes reserved_bytes available_bytes fits"
        ).split()
        document: dict[str, Any] = {name: getattr(self, name) for name in names}
        document["suggestions"] = [each.to_json() for each in self.suggestions]
        document["devices_that_fit"] = list(self.devices_that_fit)
        return document


def check_fit(
    manifest: Mapping[str, Any],
    device: DeviceProfile,
    max_batch: int = 1,
    max_seq_len: int = 2048,
    *,
    cache_bytes_per_element: float | None = None,
    workspace_bytes: int | None = None,
    weight_bytes: int | None = None,
    cache_bytes_per_token: int | None = None,
) -> Fit:
    """Memory of a bundle's model on a device, and when it does not fit the changes that make it.

    `cache_bytes_per_element` is the target's own unless given; `workspace_bytes` and `weight_bytes` replace the
    estimate and the bundle's own (a build log knows both), `cache_bytes_per_token` the bundle's own cache.

    Raises:
        BundleError: the manifest lacks what every bundle has.
    """
    shape = ModelShape.from_manifest(manifest)
    question = _Question(
        manifest, shape, cache_bytes_per_element, workspace_bytes, weight_bytes, cache_bytes_per_token
    )
    fit = question.ask(device, max_batch, max_seq_len)
    if fit.fits:
        return fit
    return question.ask(
        device,
        max_batch,
        max_seq_len,
        suggestions=_suggestions(question, device, fit),
        devices_that_fit=_devices_that_fit(question, device, fit),
    )


def estimate_workspace(shape: ModelShape, target: str, max_batch: int, max_seq_len: int) -> int:
    """Bytes of activations alive at once: the widest layer of one prompt chunk, attention scores and the logits.

    TensorRT's prompt chunk goes through every expert (three expert widths a token in fp16), onnxruntime's through the
    chosen ones, in fp32 on a CPU and fp16 on a GPU.
    """
    tokens = max(min(PREFILL_CHUNK, max_seq_len), max_batch)
    element = ELEMENT_BYTES[target]
    experts = shape.experts_per_token if target.startswith("onnxruntime") else shape.experts
    sparse = 3 * (experts * shape.expert_width + shape.shared_width) if shape.moe_layers else 0
    widest = max(sparse, 3 * shape.dense_width if shape.dense_layers else 0, 4 * shape.hidden_size)
    scores = 2 * shape.heads * min(PREFILL_CHUNK, max_seq_len) * max_seq_len * element
    logits = max_batch * shape.vocab_size * 4
    return round(_SCRATCH_FACTOR * tokens * widest * element) + scores + logits + _SCRATCH_BYTES


def size(count: float) -> str:
    """Bytes for a reader: `3.2 GiB`, `640 MiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            value = count / unit
            return f"{value:.1f} {name}" if value < 100 else f"{value:.0f} {name}"
    return f"{count:.0f} B"


@dataclass(frozen=True)
class _Question:
    """One model with the caller's overrides, to be asked of several devices and settings."""

    manifest: Mapping[str, Any]
    shape: ModelShape
    cache_element_bytes: float | None
    workspace_bytes: int | None
    weight_bytes: int | None = None
    cache_bytes_per_token: int | None = None

    def cache_bytes(self, target: str, tokens: int) -> int:
        if self.cache_bytes_per_token is not None:
            return tokens * self.cache_bytes_per_token
        element = self.cache_element_bytes or cache_element_bytes(self.manifest, target)
        return self.shape.cache_bytes(tokens, element)

    def ask(
        self,
        device: DeviceProfile,
        max_batch: int,
        max_seq_len: int,
        *,
        weight_bytes: int | None = None,
        suggestions: tuple[Suggestion, ...] = (),
        devices_that_fit: tuple[str, ...] = (),
    ) -> Fit:
        workspace = self.workspace_bytes
        if workspace is None:
            workspace = estimate_workspace(self.shape, device.target, max_batch, max_seq_len)
        return Fit(
            model=self.shape.name,
            profile=device.name,
            device=device.title,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            weight_bytes=weight_bytes or self.weight_bytes or self.shape.on(device.target).weight_bytes,
            cache_bytes=self.cache_bytes(device.target, max_batch * max_seq_len),
            workspace_bytes=workspace,
            runtime_bytes=RUNTIME_BYTES[device.kind],
            memory_bytes=device.memory_bytes,
            reserved_bytes=device.memory_reserved_bytes,
            suggestions=suggestions,
            devices_that_fit=devices_that_fit,
        )


def _suggestions(question: _Question, device: DeviceProfile, fit: Fit) -> tuple[Suggestion, ...]:
    """Fewer bits, shorter context, smaller batch: what makes it fit this device."""

    def ask(weight_bytes: int | None, batch: int, length: int) -> tuple[bool, int]:
        asked = question.ask(device, batch, length, weight_bytes=weight_bytes)
        return asked.fits, asked.total_bytes

    options = narrower_weights(question.manifest, device.target).items()
    narrower = {name: count for name, count in options if count < fit.weight_bytes}
    return suggest(ask, narrower, fit.max_batch, fit.max_seq_len)


def _devices_that_fit(question: _Question, device: DeviceProfile, fit: Fit) -> tuple[str, ...]:
    """Known devices of the same target that hold the model as asked, the smallest first."""
    enough = []
    for name in list_profiles():
        with contextlib.suppress(ProfileError):  # a broken file of the user's is no answer, and not the question
            other = load_profile(name)
            same = other.target == device.target and other.name != device.name
            if same and question.ask(other, fit.max_batch, fit.max_seq_len).fits:
                enough.append(other)
    return tuple(other.name for other in sorted(enough, key=lambda other: (other.available_bytes, other.name)))

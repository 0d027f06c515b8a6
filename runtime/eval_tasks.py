"""Tasks of EleutherAI's lm-evaluation-harness on an engine: a model adapter for its interface, registered as `moedge`.

`moedge eval BUNDLE --tasks NAMES` runs them from here; `register()` makes `--model moedge --model_args bundle=PATH`
known to the harness's own entry points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import UsageError, require
from .engine import Engine, load
from .eval import log_softmax, start_token

_PURPOSE = "run tasks of the lm-evaluation-harness"
_NEW_TOKENS = 256


def evaluate_tasks(
    bundle: str | os.PathLike[str] | Bundle,
    tasks: Sequence[str],
    profile: str | None = None,
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The harness's figures for each task: `results`, `versions`, `n-shot` and `n-samples`, as it names them.

    include_path: a folder with tasks of your own (YAML). limit: so many documents of each task.

    Raises:
        UsageError: a task that the harness does not know. DependencyError: lm-eval is not installed.
        EngineError: what `moedge.load` raises.
    """
    adapter = register()
    manager = require("lm_eval.tasks", "tasks", _PURPOSE).TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise UsageError(
            f"unknown task {', '.join(unknown) or 'name (none given)'}; `lm-eval ls tasks` lists the harness's own, "
            "--include-path FOLDER adds yours"
        )
    with load(bundle, profile, threads=threads) as engine:
        found = require("lm_eval", "tasks", _PURPOSE).simple_evaluate(
            model=adapter(engine), tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager
        )
    return {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}


@cache
def register() -> Any:
    """The adapter's class, registered with the harness as `moedge`.

    Raises:
        DependencyError: lm-eval is not installed.
    """
    registry = require("lm_eval.api.registry", "tasks", _PURPOSE)
    base = require("lm_eval.api.model", "tasks", _PURPOSE).TemplateLM

    class MoedgeLM(base):  # type: ignore[misc,valid-type]
        """Made of an engine, or by the harness of `bundle=PATH,profile=NAME,threads=N`."""

        def __init__(self, engine: Engine | None = None, *, bundle: str = "", **options: Any) -> None:
            super().__init__()
            known = {name: options[name] for name in ("profile", "threads", "max_seq_len") if options.get(name)}
            self.engine = engine if engine is not None else load(bundle, **known)

        @property
        def eot_token_id(self) -> int:
            return start_token(self.engine)

        @property
        def tokenizer_name(self) -> str:
            return str(self.engine.bundle.path)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return self.engine.tokenizer.encode(string, special=bool(add_special_tokens))

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
        ) -> list[tuple[float, bool]]:
            return [score(self.engine, context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._roll(request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [complete(self.engine, *request.args) for request in requests]

        def _roll(self, text: str) -> float:
            """Log-likelihood of a whole text, in pieces that each have as much before them as there is room for."""
            tokens = [self.eot_token_id, *self.tok_encode(text)]
            half = max(1, self.engine.session.capacity // 2)
            pieces = range(1, len(tokens), half)
            return sum(score(self.engine, tokens[:start], tokens[start : start + half])[0] for start in pieces)

    registry.register_model("moedge")(MoedgeLM)
    return MoedgeLM


def score(engine: Engine, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """(log-likelihood of the continuation in nats, whether greedy decoding gives it); old context gives way."""
    room = engine.session.capacity
    if not 0 < len(continuation) <= room:
        raise UsageError(f"a continuation has {len(continuation)} tokens; engine '{engine.profile}' scores 1 to {room}")
    tokens = [*context, *continuation][-(room + 1) :]
    logits = log_softmax(engine.logits(tokens[:-1])[-len(continuation) :])
    wanted = np.array(continuation)
    value = float(logits[np.arange(len(wanted)), wanted].sum())
    return value, bool((logits.argmax(-1) == wanted).all())


def complete(engine: Engine, context: str, options: dict[str, Any]) -> str:
    """The text that goes on from `context`, up to one of `options["until"]`; old context gives way."""
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    most = min(int(options.get("max_gen_toks", _NEW_TOKENS)), engine.session.capacity - 1)
    tokens = (engine.tokenizer.encode(context) or [start_token(engine)])[-(engine.session.capacity - most) :]
    sampled = bool(options.get("do_sample"))
    temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
    return "".join(engine.generate(tokens, max_new_tokens=most, temperature=temperature, stop=stop))

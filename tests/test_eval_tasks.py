"""Tasks through the lm-evaluation-harness: a small local one, against the scores recomputed; without it, one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import moedge
from moedge.errors import DependencyError, UsageError
from moedge.runtime.eval_commands import eval_command
from moedge.runtime.eval_tasks import complete, evaluate_tasks, register, score

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a stone", " seven"], "gold": 0},
    {"question": "Two and two is", "choices": [" five", " four"], "gold": 1},
    {"question": "Water is", "choices": [" dry", " wet", " loud"], "gold": 1},
]
TASK = """task: moedge_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one multiple-choice task of the harness and its data."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "local.yaml").write_text(TASK.format(data=data))
    return folder


def likelihood(engine: Any, context: list[int], continuation: list[int]) -> float:
    """Token by token, each from a context of its own."""
    total = 0.0
    for place, token in enumerate(continuation):
        logits = engine.logits([*context, *continuation[:place]])[-1].astype(np.float64)
        total += logits[token] - np.log(np.exp(logits).sum())
    return total


def test_score_by_other_means(tiny_bundle: Path) -> None:
    with moedge.load(tiny_bundle, threads=1) as engine:
        context, continuation = engine.tokenize("The sky is"), engine.tokenize(" blue")
        value, greedy = score(engine, context, continuation)
        assert value == pytest.approx(likelihood(engine, context, continuation), abs=1e-4) and not greedy
        best = int(engine.logits(context)[-1].argmax())
        assert score(engine, context, [best])[1]
        room = engine.session.capacity
        long = [1] * (3 * room)
        assert score(engine, long, continuation) == score(engine, long[: room - 4], continuation)
        with pytest.raises(UsageError, match=f"a continuation has {room + 1} tokens; engine 'cpu' scores 1 to {room}"):
            score(engine, context, [1] * (room + 1))


def test_complete(tiny_bundle: Path) -> None:
    with moedge.load(tiny_bundle, threads=1) as engine:
        text = "".join(engine.generate("abc", max_new_tokens=12))
        assert complete(engine, "abc", {"max_gen_toks": 12, "until": []}) == text
        assert complete(engine, "abc", {"max_gen_toks": 12, "until": [text[2]]}) == text[: text.index(text[2])]
        assert isinstance(complete(engine, "abc" * 999, {"max_gen_toks": 3, "until": "x"}), str)
        assert isinstance(complete(engine, "", {"max_gen_toks": 3}), str)


@pytest.mark.slow
def test_a_local_multiple_choice_task(tiny_bundle: Path, tasks: Path) -> None:
    found = evaluate_tasks(tiny_bundle, ["moedge_local"], include_path=tasks, threads=1)
    right, right_by_length = [], []
    with moedge.load(tiny_bundle, threads=1) as engine:
        for each in QUESTIONS:
            context = engine.tokenize(each["question"])
            values = [likelihood(engine, context, engine.tokenize(choice)) for choice in each["choices"]]
            right.append(int(np.argmax(values)) == each["gold"])
            lengths = [len(choice) for choice in each["choices"]]
            right_by_length.append(int(np.argmax(np.array(values) / lengths)) == each["gold"])
    assert found["results"]["moedge_local"]["acc,none"] == pytest.approx(np.mean(right))
    assert found["results"]["moedge_local"]["acc_norm,none"] == pytest.approx(np.mean(right_by_length))
    assert found["n-samples"]["moedge_local"]["effective"] == 3


def test_the_harness_knows_the_adapter_by_name(tiny_bundle: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model

    register()
    model = get_model("moedge")(bundle=str(tiny_bundle), threads=1)
    with model.engine:
        (value,) = model.loglikelihood_rolling([type("Request", (), {"args": ("abc",)})()])
        wanted = likelihood(model.engine, [model.eot_token_id], model.tok_encode("abc"))
        assert value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_command(tiny_bundle: Path, tasks: Path) -> None:
    options = [str(tiny_bundle), "--include-path", str(tasks), "--threads", "1", "--limit", "2"]
    shown = CliRunner().invoke(eval_command, [*options, "--tasks", "moedge_local"])
    assert shown.exit_code == 0, shown.output
    assert "moedge_local" in shown.stdout and "acc_norm" in shown.stdout
    unknown = CliRunner().invoke(eval_command, [*options, "--tasks", "moedge_local,nothing"])
    assert str(unknown.exception) == (
        "unknown task nothing; `lm-eval ls tasks` lists the harness's own, --include-path FOLDER adds yours"
    )


def test_refusals(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neither = CliRunner().invoke(eval_command, [str(tiny_bundle)])
    assert neither.exit_code == 2 and "give a text, --text FILE, or tasks, --tasks NAMES" in neither.stderr
    mixed = CliRunner().invoke(eval_command, [str(tiny_bundle), "--tasks", "a", "--context", "8"])
    assert mixed.exit_code == 2 and "--context belongs to --text" in mixed.stderr
    register.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(DependencyError) as missing:
        evaluate_tasks(tiny_bundle, ["a"])
    assert str(missing.value) == (
        "lm_eval is not installed (needed to run tasks of the lm-evaluation-harness); install it: "
        "pip install 'moedge[tasks]'"
    )

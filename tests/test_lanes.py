"""Several sequences in one run of the CPU engine: each as it would be alone, whoever joins, leaves or fails."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from family_cases import FAMILIES, VOCAB, make_model, save_model

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError, EngineError
from moedge.profiles.targets import onnxruntime as target
from moedge.runtime import kernels
from moedge.runtime.preflight import read_engine
from moedge.runtime.requests import make_request
from moedge.runtime.scheduler import Scheduler
from moedge.runtime.sessions import Session, SessionOptions, backend_module

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (5, 17, 30)
LAST = 3  # tokens of each that are decoded
MOST = target.LANES if kernels.library() is None else target.OWN_LANES
WITH_FIXED_ROPE = {
    "deepseek": "normalized_gqa_biases",
    "deepseek_v2": "many_groups_yarn",
    "gpt_oss": "alternate_windows",
    "mixtral": "odd_experts_short_window",
    "olmoe": "clipped",
    "phimoe": "both_experts_window_tied",
}


@pytest.fixture(scope="module")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model at int4 in groups of 128, whose kernels round by the number of rows."""
    folder = tmp_path_factory.mktemp("lanes") / "sample"
    moedge.export(ROOT / "sample", folder, weights="int4", verify=False)
    moedge.build(folder, "cpu", max_seq_len=256)
    return folder


@pytest.fixture(scope="module")
def grouped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle("mixtral", tmp_path_factory.mktemp("lanes-grouped"), weights="int4")


def make_bundle(family: str, folder: Path, **options: Any) -> Path:
    name = WITH_FIXED_ROPE.get(family) or next(iter(FAMILIES[family].configurations))
    save_model(make_model(family, name), family, folder / "checkpoint")
    bundle = moedge.export(folder / "checkpoint", folder / "bundle", group_size=16, verify=False, **options)
    moedge.build(bundle.path, "cpu")
    return bundle.path


def open_session(path: Path, lanes: int) -> Session:
    bundle, options = Bundle.open(path), SessionOptions(1, lanes=lanes)
    return backend_module("onnxruntime").open_session(bundle, read_engine(bundle, "cpu"), options)


def fill(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Compute a prompt; the logits [vocab] after it."""
    session.truncate(0)
    return session.step(tokens, np.array([len(tokens) - 1])).copy()[0]


def take_apart(path: Path) -> None:
    """Give each layer's cache an input of its own, as graphs of our own attention had before."""
    model = onnx.load(path, load_external_data=False)
    stacks = {value.name: value for value in model.graph.input if value.name.startswith("past.")}
    for node in model.graph.node:
        layer = [attribute for attribute in node.attribute if attribute.name == "layer"]
        for place, name in enumerate(node.input):
            if name not in stacks:
                continue
            stack, _, lane = name.rpartition(".")
            node.input[place] = f"{stack}.{layer[0].i}.{lane}" if lane.isdigit() else f"{name}.{layer[0].i}"
            shape = stacks[name].type.tensor_type.shape.dim
            sizes = [dim.dim_value or dim.dim_param for dim in shape[1:]]
            kind_of = stacks[name].type.tensor_type.elem_type
            model.graph.input.append(onnx.helper.make_tensor_value_info(node.input[place], kind_of, sizes))
        for attribute in layer:
            node.attribute.remove(attribute)
    for value in stacks.values():
        model.graph.input.remove(value)
    kept = {each.key: each.value for each in model.metadata_props if each.key != kernels.STACKED}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    path.write_bytes(model.SerializeToString())


@pytest.mark.skipif(kernels.library() is None, reason="no kernels were compiled")
@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral"])
def test_an_engine_with_an_input_for_each_layer_still_runs(family: str, tmp_path: Path) -> None:
    path = make_bundle(family, tmp_path, weights="int4")
    prompt = np.random.default_rng(8).integers(0, VOCAB, 20)
    sessions = [open_session(path, lanes) for lanes in (1, 4)]
    expected = [(fill(session, prompt), session.step(prompt[:1], np.array([0])).copy()) for session in sessions]
    for name in (MODEL, target.LANES_MODEL):
        take_apart(path / "engines" / "cpu" / kernels.own_name(name))
    for lanes, (first, second) in zip((1, 4), expected, strict=True):
        session = open_session(path, lanes)
        np.testing.assert_array_equal(fill(session, prompt), first)
        np.testing.assert_array_equal(session.step(prompt[:1], np.array([0])), second)


@pytest.mark.parametrize("family", FAMILIES)
def test_lanes_of_several_lengths_give_the_logits_of_single_sequences(family: str, tmp_path: Path) -> None:
    path = make_bundle(family, tmp_path, weights="fp32")
    random = np.random.default_rng(12)
    prompts = [random.integers(0, VOCAB, length) for length in LENGTHS]
    single = open_session(path, 1)
    expected, routes = [], []
    for prompt in prompts:
        first = fill(single, prompt[:-LAST])
        rest = [single.step(prompt[-LAST:][place : place + 1], np.array([0])).copy()[0] for place in range(LAST)]
        expected.append(np.stack([first, *rest]))
        routes.append(single.routing.experts.copy())
    lanes = open_session(path, 3)
    assert (single.lanes, lanes.lanes) == (1, MOST)
    sessions = [lanes, lanes.another(), lanes.another()]
    found = [[fill(each, prompt[:-LAST])] for each, prompt in zip(sessions, prompts, strict=True)]
    for place in range(LAST):
        tokens = np.array([prompt[-LAST + place] for prompt in prompts])
        for one, logits in zip(found, sessions[0].step_together(sessions[1:], tokens), strict=True):
            one.append(logits.copy())
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5)
    for session, length, experts in zip(sessions, LENGTHS, routes, strict=True):
        assert session.length == length
        np.testing.assert_array_equal(session.routing.experts, experts)


@pytest.mark.parametrize("kind", ["sample", "tiny", "grouped", "float"])
def test_one_sequence_has_the_bits_of_its_own_graph(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With our kernels always; `MatMulNBits` in groups of more than 32 rounds single rows in its own way."""
    if kind == "sample" and kernels.library() is None:
        pytest.skip("the sample's groups are of 128, and our kernels are not compiled here")
    path = make_bundle("qwen2_moe", tmp_path, weights="fp32") if kind == "float" else None
    path = path or request.getfixturevalue(f"{kind}_bundle")
    single, first = open_session(path, 1), open_session(path, 2)
    sessions = [first, first.another(), first.another()]
    random = np.random.default_rng(6)
    prompts = [random.integers(0, VOCAB, length) for length in LENGTHS]
    for session, prompt in zip(sessions, prompts, strict=True):
        np.testing.assert_array_equal(fill(session, prompt), fill(single, prompt))
    found = [first.step_together(sessions[1:], np.arange(3) + place).copy() for place in range(4)]
    for lane, prompt in enumerate(prompts):
        fill(single, prompt)
        for place in range(4):
            alone = single.step(np.array([lane + place]), np.array([0]))[0]
            np.testing.assert_array_equal(alone, found[place][lane])


@pytest.mark.parametrize("kind", ["sample", "grouped"])
def test_no_bit_depends_on_who_else_is_stepped(kind: str, request: pytest.FixtureRequest) -> None:
    """Sequences join and leave at random, in any lane; each has the logits that it has when it is stepped alone."""
    first = open_session(request.getfixturevalue(f"{kind}_bundle"), 2)
    random = np.random.default_rng(4)
    sessions = [first, *(first.another() for _ in range(7))]
    prompts = [random.integers(0, VOCAB, length) for length in (3, 63, 17, 30, 64, 1, 5, 40)]
    news = random.integers(0, VOCAB, (len(sessions), 9))
    expected = []
    for prompt, tokens in zip(prompts, news, strict=True):
        fill(first, prompt)
        expected.append([first.step(tokens[place : place + 1], np.array([0])).copy()[0] for place in range(9)])
    for session, prompt in zip(sessions, prompts, strict=True):
        fill(session, prompt)
    done, sizes = [0] * len(sessions), []
    while min(done) < 9:
        most = 1 + len(sizes) % len(sessions)
        chosen = [one for one in random.permutation(len(sessions)) if done[one] < 9][:most]
        group = [sessions[one] for one in chosen]
        logits = group[0].step_together(group[1:], np.array([news[one][done[one]] for one in chosen]))
        for one, row in zip(chosen, logits, strict=True):
            np.testing.assert_array_equal(row, expected[one][done[one]])
            done[one] += 1
        sizes.append(len(chosen))
    assert set(sizes) == set(range(1, len(sessions) + 1))


def test_served_texts_are_the_tokens_of_single_ones(sample_bundle: Path) -> None:
    """More texts than slots, more slots than lanes, prompts of mixed lengths, chunks in between."""
    words = (ROOT / "sample" / "heldout.txt").read_text().split("\n")
    with moedge.load(sample_bundle, lanes=2, threads=1, prefill_chunk=32) as engine:
        prompts = [text for text in words if text.strip()][: engine.session.lanes + 16]
        prompts = ["\n".join(prompts[place : place + 1 + place % 5]) for place in range(len(prompts))]
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "logprobs": 2}
        alone = []
        for prompt in prompts:
            generation = engine.generate(prompt, **options)
            list(generation)
            alone.append((generation.tokens, generation.logprobs))
        engine.prefixes.clear()
        done: queue.Queue[int] = queue.Queue()
        with Scheduler(engine, slots=engine.session.lanes + 3, queue=100) as scheduler:
            requests = [make_request(engine, prompt, **options) for prompt in prompts]
            jobs = scheduler.submit(requests, lambda place, update: done.put(place) if update.done else None)
            for _ in jobs:
                done.get(timeout=60)
        assert [(job.writer.tokens, job.writer.logprobs) for job in jobs] == alone


def test_a_lane_without_room_fails_alone(grouped_bundle: Path) -> None:
    bundle = Bundle.open(grouped_bundle)
    with moedge.load(bundle, lanes=3, threads=1, max_seq_len=24) as engine:
        first = engine.session
        sessions = [first, first.another(), first.another()]
        for session, count in zip(sessions, (4, 24, 9), strict=True):
            fill(session, np.arange(count))
        with pytest.raises(EngineError, match="context is full: it has room for 24 tokens, 24 are in it and 1 more"):
            first.step_together(sessions[1:], np.array([1, 2, 3]))
        assert [session.length for session in sessions] == [4, 24, 9]
        before = first.step_together(sessions[2:], np.array([1, 3])).copy()
        for session in (first, sessions[2]):
            session.truncate(session.length - 1)
        contexts = [engine.new_context() for _ in range(3)]
        for context, session in zip(contexts, sessions, strict=True):
            context.session, context.tokens = session, list(range(session.length))
        from moedge.runtime.scheduler import step_in_lanes

        found = step_in_lanes(list(zip(contexts, (1, 2, 3), strict=True)))
        assert isinstance(found[1], EngineError) and not isinstance(found[0], Exception)
        np.testing.assert_array_equal(np.stack([found[0], found[2]]), before)  # type: ignore[arg-type]


def test_wrong_uses_of_lanes(sample_bundle: Path) -> None:
    first = open_session(sample_bundle, 2)
    others = [first.another() for _ in range(first.lanes)]
    with pytest.raises(ValueError, match=f"{MOST + 1} tokens for {MOST + 1} sequences in {MOST} lanes"):
        first.step_together(others, np.zeros(MOST + 1, np.int64))
    with pytest.raises(ValueError, match=f"1 tokens for 2 sequences in {MOST} lanes"):
        first.step_together(others[:1], np.zeros(1, np.int64))
    single = open_session(sample_bundle, 1)
    with pytest.raises(ValueError, match="this engine steps 1 sequence a run, not 2"):
        single.step_together([single.another()], np.zeros(2, np.int64))


def test_a_closed_sequence_leaves_the_others(sample_bundle: Path) -> None:
    first = open_session(sample_bundle, 2)
    second = first.another()
    for session in (first, second):
        fill(session, np.arange(10))
    first.step_together([second], np.array([1, 2]))
    want = fill(second, np.arange(20))
    first.close()
    np.testing.assert_array_equal(fill(second, np.arange(20)), want)
    second.close()
    second.close()


def test_how_many_lanes_an_engine_has(grouped_bundle: Path, tmp_path: Path) -> None:
    save_model(make_model("phimoe", "longrope"), "phimoe", tmp_path / "checkpoint")
    bundle = moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32", verify=False)
    moedge.build(bundle.path, "cpu")
    assert open_session(bundle.path, 4).lanes == 1
    with pytest.raises(BuildError, match="max_batch 2: this model's rope depends on the length, .* use --max-batch 1"):
        moedge.build(bundle.path, "cpu", max_batch=2)
    moedge.build(grouped_bundle, "cpu", max_batch=40)
    info = read_engine(Bundle.open(grouped_bundle), "cpu")
    assert (info.max_batch, open_session(grouped_bundle, 2).lanes) == (40, 40)

"""onnxruntime-genai over the folder of an onnxruntime engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import onnx
import pytest

import moedge
from moedge.runtime import kernels

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
pytest.importorskip("transformers", reason="compares with transformers")
og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai (0.18 or later) is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 24
# One of each family and each kind of attention: windows, sinks, odd heads that are padded, ropes that grow, latents.
CASES = [
    ("deepseek_v3", "many_groups"),
    ("deepseek_v2", "many_groups_yarn"),
    ("deepseek", "first_dense_dynamic"),
    ("mixtral", "top_1_mqa_tied_odd_heads"),
    ("mixtral", "odd_experts_short_window"),
    ("olmoe", "longrope"),
    ("qwen2_moe", "every_second_layer_window"),
    ("qwen3_moe", "normalized_mqa"),
    ("granitemoe", "multipliers"),
    ("phimoe", "odd_experts_biases_mqa"),
    ("gpt_oss", "alternate_windows"),
]


def generate(folder: Path, prompts: np.ndarray, length: int, **options: Any) -> list[list[int]]:
    """Greedy tokens after each of the prompts [B, S], until the texts are `length` long."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, batch_size=len(prompts), **options)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompts.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist() for row in range(len(prompts))]


def greedy(model: Any, prompt: list[int], length: int, end: int) -> list[int]:
    """transformers' own, the text computed anew for each token: its caches of windows give other tokens. Filled with
    the end token."""
    text = list(prompt)
    with torch.no_grad():
        while len(text) < length and end not in text:
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text + [end] * (length - len(text))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_genai_generates_transformers_greedy_tokens(family: str, name: str, tmp_path: Path) -> None:
    model = family_cases.make_model(family, name)
    vocab = model.config.vocab_size
    model.config.eos_token_id = model.generation_config.eos_token_id = end = vocab - 1
    family_cases.save_model(model, family, tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32")
    moedge.build(tmp_path / "bundle", "cpu")
    prompts = np.array([[3, 41, 5, 26, 7, 9, 9, 30], [9, 8, 12, 10, 1, 4, 2, 2]]) % vocab
    found = generate(tmp_path / "bundle" / "engines" / "cpu", prompts, 8 + NEW)
    assert found == [greedy(model, prompt.tolist(), 8 + NEW, end) for prompt in prompts]


@pytest.fixture(scope="module")
def moved_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 bundle somewhere else than where it was built, with the cache that genai has."""
    built = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "bundle")
    moedge.build(built, "cpu", kv_cache="fp32")
    return Path(shutil.move(built, tmp_path_factory.mktemp("moved") / "bundle"))


def test_text_and_tokens_are_those_of_moedges_own_engine(moved_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "stock")  # as genai has them
    monkeypatch.chdir(moved_bundle / "engines")  # the weights are found from the folder, not from where we are
    model = og.Model("cpu")
    tokenizer = og.Tokenizer(model)
    text = "def read(self"
    with moedge.load(moved_bundle) as engine:
        tokens = engine.tokenize(text)
        assert tokenizer.encode(text).tolist() == tokens
        generator = og.Generator(model, og.GeneratorParams(model))
        generator.append_tokens(tokens[:4])
        generator.append_tokens(tokens[4:])
        logits = np.asarray(generator.get_output("logits"))
        expected = engine.logits(tokens)[-1]
    assert logits.shape == (1, 1, len(expected))
    # Both multiply int4 weights by int8 activations, and absorb the attention in another order.
    np.testing.assert_allclose(logits[0, 0], expected, atol=0.02 * np.abs(expected).max())


def test_prompts_of_several_lengths_are_padded_on_the_right(moved_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(moved_bundle, tmp_path / "bundle")) / "engines" / "cpu"
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"] |= {"pad_token_id": 319, "eos_token_id": []}
    (folder / "genai_config.json").write_text(json.dumps(config))
    long, short = [5, 9, 77, 3, 8, 200], [61, 7, 4]
    both = generate(folder, np.array([long, [*short, 319, 319, 319]]), 20)
    assert both[0] == generate(folder, np.array([long]), 20)[0]
    alone = generate(folder, np.array([short]), 17)[0]
    assert [token for token in both[1] if token != 319] == alone


def test_the_folder_carries_the_models_own_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [7, 9], "bos_token_id": 2}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    moedge.export(checkpoint, tmp_path / "bundle", weights="int8")
    folder = moedge.build(tmp_path / "bundle", "cpu", max_seq_len=48)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [7, 9] and config["model"]["bos_token_id"] == 2
    assert config["model"]["context_length"] == config["search"]["max_length"] == 48
    search = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 1.0}
    assert {key: config["search"][key] for key in search} == search
    listed = json.loads((folder / "engine.json").read_text())["files"]
    assert {"genai.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx"} <= set(listed)
    graph = onnx.load(folder / "genai.onnx", load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {"weights.bin"}

"""optimum: its command that exports bundles, and its model class that loads them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="optimum needs torch")
transformers = pytest.importorskip("transformers", reason="optimum needs transformers")
if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.onnxruntime") is None:
    pytest.skip("optimum-onnx is not installed (pip install 'moedge[optimum]')", allow_module_level=True)

import family_cases  # noqa: E402

import moedge  # noqa: E402
from moedge import cli  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REGISTER = "export/optimum_register/register_moedge.py"


def optimum_cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """optimum-cli in a fresh interpreter; where this moedge was installed before it had the file that optimum looks
    for, that is put where a wheel puts it."""
    environment = {**os.environ}
    spec = importlib.util.find_spec("optimum.commands.register")
    assert spec is not None and spec.submodule_search_locations is not None
    if not any((Path(place) / "register_moedge.py").is_file() for place in spec.submodule_search_locations):
        place = folder / "path" / "optimum" / "commands" / "register"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / REGISTER, place)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder / "path"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


def test_optimum_cli_exports_what_moedge_exports(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--weights", "int8", "--group-size", "32", "--zero-points"]
    done = optimum_cli(tmp_path, "export", "moedge", "--model", str(tiny_checkpoint), "theirs", *options)
    assert done.returncode == 0, done.stderr
    assert f"written: {Path('theirs') / 'moedge.json'}" in done.stdout
    cli.main.main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "ours"), *options], standalone_mode=False)
    theirs, ours = (moedge.Bundle.open(tmp_path / name).manifest for name in ("theirs", "ours"))
    assert theirs["files"] == ours["files"] and theirs["quantization"] == ours["quantization"]
    again = optimum_cli(tmp_path, "export", "moedge", "-m", str(tiny_checkpoint), "theirs", "--weights", "fp16")
    assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith("error: theirs is not empty; name ")
    forced = ["--weights", "fp16", "--force", "--no-verify", "--json"]
    forced_done = optimum_cli(tmp_path, "export", "moedge", "-m", str(tiny_checkpoint), "theirs", *forced)
    assert json.loads(forced_done.stdout)["provenance"]["verified"] is False
    wrong = optimum_cli(tmp_path, "export", "moedge", "-m", str(tiny_checkpoint), "x", "--weights", "int3")
    assert wrong.returncode == 2 and "choose from" in wrong.stderr


def test_its_help_has_every_option_of_moedge_export(tmp_path: Path) -> None:
    shown = optimum_cli(tmp_path, "export", "moedge", "--help").stdout
    command = cli.main.get_command(None, "export")  # type: ignore[arg-type]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert not [name for name in options - {"-o", "--output", "source"} if name not in shown]
    assert "moedge" in optimum_cli(tmp_path, "export", "--help").stdout


# Attention of both kinds, windows, sinks, biases, tied embeddings; an engine beside, which is a model.onnx too.
CASES = [
    ("deepseek_v3", "plain"),
    ("mixtral", "odd_experts_short_window"),
    ("qwen3_moe", "normalized_mqa"),
    ("gpt_oss", "alternate_windows"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_bundle_loads_and_generates_transformers_greedy_tokens(family: str, name: str, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    if family == "deepseek_v3":
        from checkpoints import make_model, save_model

        model = make_model(seed=4)
        save_model(model, tmp_path / "checkpoint")
    else:
        model = family_cases.make_model(family, name)
        family_cases.save_model(model, family, tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32")
    moedge.build(tmp_path / "bundle", "cpu")
    loaded = ORTModelForCausalLM.from_pretrained(tmp_path / "bundle", use_cache=False)
    assert Path(loaded.path) == tmp_path / "bundle" / "model.onnx"
    ids = torch.tensor([[3, 41, 5, 260, 7], [9, 9, 12, 100, 1]]) % model.config.vocab_size
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    assert torch.equal(loaded.generate(ids, **settings), expected)
    assert expected.shape == (2, 21) or bool((expected[:, 5:] == 0).any())

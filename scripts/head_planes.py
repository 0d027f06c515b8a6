"""What it costs that only the likeliest rows of a 6-bit head are read with all six bits: for bench_quantization.py.

The kernels do so above 32,768 tokens (runtime/kernels/planes.cpp), and the sample has 3,072: here as large a share of
its rows is refined, in numpy, of activations rounded as the kernels round them. S = tokens, V = rows, K = columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.runtime.eval import log_softmax

Array = np.ndarray[Any, Any]
SHARES = (0.024, 0.05, 0.1)  # the first is that of 2,400 of 100,000
ALGORITHMS = ("rtn", "hqq", "gptq")
LENGTH, WINDOWS = 512, 20
GROUP = 128


def measure_planes(text: str, sample: Path, folder: Path, calibration: Path) -> list[dict[str, Any]]:
    """For each algorithm: what each kind of head costs beside the same weights' int6 one, against fp32."""
    plain = moedge.export(sample, folder / "fp32", weights="fp32", force=True, verify=False)
    tokens = windows_of(plain, text)
    wanted = [logits_of(read_head(plain, ids)) for ids in tokens]
    results = []
    for algorithm in ALGORITHMS:
        options: dict[str, Any] = {"calibration": calibration} if algorithm == "gptq" else {}
        given = {"algorithm": algorithm, "group_size": GROUP, "verify": False, "force": True, **options}
        six, four = (moedge.export(sample, folder / head, head=head, **given) for head in ("int6", "int4"))
        found: dict[str, list[Array]] = {}
        for ids in tokens:
            one, other = read_head(six, ids), read_head(four, ids)
            x = rounded(one["x"])
            full, begun = x @ one["weights"].T, x @ upper_alone(one).T
            logits = {"int6": full, "int4": x @ other["weights"].T, "4 of 6 bits": begun}
            for share in SHARES:
                logits[f"{share:.1%} of the rows in 6 bits"] = refine(begun, full, round(share * full.shape[1]))
            for name, each in logits.items():
                found.setdefault(name, []).append(each)
        for name, each in found.items():
            results.append({"algorithm": algorithm, "head": name, **compare(each, wanted, tokens)})
    return results


def windows_of(bundle: Bundle, text: str) -> list[Array]:
    """int64 [LENGTH] pieces of the text."""
    from tokenizers import Tokenizer

    ids = np.array(Tokenizer.from_file(str(bundle.file("tokenizer.json"))).encode(text).ids, np.int64)
    return [ids[at : at + LENGTH] for at in range(0, WINDOWS * LENGTH, LENGTH)]


def read_head(bundle: Bundle, ids: Array) -> dict[str, Array]:
    """What the canonical graph's head multiplies: x [S, K], weights [V, K], and of 6-bit ones codes and scales."""
    model = onnx.load(bundle.file(MODEL), load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    product = made[model.graph.output[0].name]
    while product.op_type != "MatMul":
        product = made[product.input[0]]
    names = {"x": product.input[0], "weights": made[product.input[1]].input[0]}
    source = made.get(names["weights"])
    if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in made:
        names |= {"codes": source.input[0], "scales": source.input[1]}
    held = {tensor.name for tensor in model.graph.initializer}
    asked = {key: name for key, name in names.items() if name not in held}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked.values())
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip(asked, session.run(list(asked.values()), {"input_ids": ids[None]}), strict=True))
    if "weights" not in found:
        (tensor,) = [each for each in model.graph.initializer if each.name == names["weights"]]
        found["weights"] = onnx.numpy_helper.to_array(tensor, str(bundle.path))
    found["x"] = found["x"].reshape(len(ids), -1)
    return found


def logits_of(head: dict[str, Array]) -> Array:
    logits: Array = head["x"] @ head["weights"].T
    return logits


def rounded(x: Array) -> Array:
    """As the kernels take activations: 8 bits in groups."""
    parts = x.reshape(len(x), -1, GROUP)
    scales = np.abs(parts).max(-1, keepdims=True) / np.float32(127)
    values: Array = (np.rint(parts / scales) * scales).reshape(x.shape)
    return values


def upper_alone(head: dict[str, Array]) -> Array:
    """[V, K] with the lower two bits at their mean."""
    codes = head["codes"].astype(np.float32) - 96
    values = np.floor(codes / 4) * 4 + np.float32(1.5) - 32
    scales = np.repeat(head["scales"], codes.shape[1] // head["scales"].shape[1], axis=1)
    weights: Array = values * scales
    return weights


def refine(begun: Array, full: Array, rows: int) -> Array:
    """The `rows` largest of each token from `full`."""
    least = np.partition(begun, -rows, axis=1)[:, -rows, None]
    logits: Array = np.where(begun >= least, full, begun)
    return logits


def compare(found: list[Array], wanted: list[Array], tokens: list[Array]) -> dict[str, float]:
    """Over all windows: mean divergence from `wanted` in nats, share of the same likeliest, mean loss in nats."""
    spread, same, loss, count = 0.0, 0, 0.0, 0
    for mine, others, ids in zip(found, wanted, tokens, strict=True):
        p, q = log_softmax(others), log_softmax(mine)
        spread += float((np.exp(p) * (p - q)).sum())
        same += int((mine.argmax(1) == others.argmax(1)).sum())
        loss -= float(q[np.arange(len(ids) - 1), ids[1:]].sum())
        count += len(ids)
    return {"kl_nats": spread / count, "top1_agreement": same / count, "loss_nats": loss / (count - len(tokens))}


def planes_section(results: list[dict[str, Any]]) -> list[str]:
    """Of docs/quantization.md."""
    lines = [
        "## A head whose likeliest rows alone are read with six bits",
        "",
        "With more than 32,768 tokens in the vocabulary our kernels compute every logit from the upper four bits of a",
        "6-bit head, and the largest, about 2,400 of 100,000, with all six; other kernels and targets read all.",
        "The sample's vocabulary is smaller; here as large a share of it, and larger ones, are refined in numpy (group",
        f"{GROUP}, {WINDOWS * LENGTH:,} tokens of the text). Added: to the divergence of int6.",
        "",
        "| weights | head | KL divergence | added | same token | loss in nats |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    name = ""
    for result in results:
        base = next(each for each in results if each["algorithm"] == result["algorithm"])
        added = "" if result is base else f"{result['kl_nats'] / base['kl_nats'] - 1:+.2%}"
        shown = "" if result["algorithm"] == name else f"int4 {result['algorithm']}"
        name = result["algorithm"]
        cells = [shown, result["head"], f"{result['kl_nats']:.5f}", added, f"{result['top1_agreement']:.1%}"]
        lines.append(f"| {' | '.join([*cells, format(result['loss_nats'], '.5f')])} |")
    return lines

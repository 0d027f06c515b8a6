"""docs/performance.md and its chart, made from what scripts/bench_peers.py measured; no number is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OURS, THEIRS = "moedge", "llama.cpp"
DECODE_GOAL = 1.6
LONG_GOAL = 0.6  # of the rate at the short context
# (what is compared, the result's list, tokens of a run, the goal for the ratio)
WHAT = (
    ("prefill", "prefill_s", "prompt_tokens", 2.5),
    ("decode", "decode_s", None, DECODE_GOAL),
    ("decode at the long context", "decode_long_s", None, DECODE_GOAL),
)
_INK, _OURS, _THEIRS = "#222222", "#1f6f6f", "#b9b9b0"


def rates(result: dict[str, Any], peer: str, key: str, tokens: str | None) -> list[float]:
    """Tokens a second, round by round."""
    count = result[tokens] if tokens else 1
    return [count / seconds for seconds in result["peers"][peer][key]]


def ratios(result: dict[str, Any], key: str) -> list[float]:
    """How many times faster than llama.cpp, round by round."""
    pairs = zip(result["peers"][THEIRS][key], result["peers"][OURS][key], strict=True)
    return [theirs / ours for theirs, ours in pairs]


def fraction(found: dict[str, Any], read: int, seconds: Sequence[float]) -> float:
    """Of the memory limit: bytes that a step has to read over its time, over the bandwidth; the rounds' median."""
    rounds = zip(seconds, found["bandwidth_bytes_per_s"], strict=True)
    return statistics.median(read / each / bandwidth for each, bandwidth in rounds)


def write_page(results: Sequence[dict[str, Any]], page: Path) -> None:
    """The page, and the chart beside it where matplotlib is installed."""
    chart = page.with_suffix(".svg")
    try:
        draw(results, chart)
    except ImportError:
        chart.unlink(missing_ok=True)
    page.write_text(render(results, chart.name if chart.exists() else None), encoding="utf-8")


def render(results: Sequence[dict[str, Any]], chart: str | None) -> str:
    lines = [
        "# Performance beside llama.cpp",
        "",
        "Made by `scripts/bench_peers.py` from its measurements (performance.json beside this file has the rounds).",
        "Random weights of the shape named; each with its defaults, batch 1:",
        f"moedge at {_forms(results)}, llama.cpp at Q4_0 (head Q6_K).",
        f"On {_processors(results)}; Machine, at the end, says more.",
        "Both are loaded, take turns round by round, and stand still while the other runs.",
        "Rates are medians of the rounds; ratios are of one round: the median, the least and the most. So are shares",
        "of the memory limit, each of its own round's bandwidth. Behind a shape's name, after a colon, stands how many",
        "of its layers were taken. The memory's speed changes from run to run, and with it all rates: between sections",
        "compare ratios.",
        "The goals are the project's own, and for the median.",
        "",
        *([f"![Tokens a second, by shape]({chart})", ""] if chart else []),
    ]
    for title, key, tokens, goal in WHAT:
        lines += [f"## {title[0].upper()}{title[1:]}", "", *_table(results, key, tokens, goal), ""]
    lines += ["## What the memory allows", "", *_limits(results), ""]
    lines += ["## Loading and memory", "", *_memory(results), ""]
    for title, key, section in (
        ("With an int4 head", "int4_head", _int4_head),
        ("Beside onnxruntime-genai", "genai", _genai),
        ("Eight sequences a step", "batch", _batch),
        ("Beside optimum", "optimum", _optimum),
    ):
        known = [result for result in results if key in result]
        lines += [f"## {title}", "", *section(known), ""] if known else []
    lines += ["## Machine", ""]
    lines += [f"- {each}" for each in dict.fromkeys(_machine(result) for result in results)]
    return "\n".join(lines) + "\n"


def _table(results: Sequence[dict[str, Any]], key: str, tokens: str | None, goal: float) -> list[str]:
    which = key.removesuffix("_s")
    decodes = which in results[0]["bytes_per_token"]
    head = ["shape", "context", "moedge tokens/s", "llama.cpp tokens/s", "ratio", "least to most", f"goal {goal}x"]
    head += ["of the memory limit"] if decodes else []
    head += ["of its own at the short", f"goal {LONG_GOAL:.0%}"] if which == "decode_long" else []
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for result in results:
        ours, theirs, times = rates(result, OURS, key, tokens), rates(result, THEIRS, key, tokens), ratios(result, key)
        context = result["long_context"] if which == "decode_long" else result["prompt_tokens"]
        cells = [result["shape"], f"{context:,}", f"{statistics.median(ours):.1f}", f"{statistics.median(theirs):.1f}"]
        cells += [f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"]
        cells += ["met" if statistics.median(times) >= goal else "not met"]
        if decodes:
            cells += [f"{fraction(result, result['bytes_per_token'][which], result['peers'][OURS][key]):.0%}"]
        if which == "decode_long":
            own = result["peers"][OURS]
            pairs = zip(own["decode_s"], own[key], strict=True)
            kept = statistics.median(short / long for short, long in pairs)
            cells += [f"{kept:.0%}", "met" if kept >= LONG_GOAL else "not met"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _forms(results: Sequence[dict[str, Any]]) -> str:
    """How our weights and cache are stored."""
    told = []
    for result in results:
        made = {"weights": "int4", "head": "int8", "group_size": 128} | result.get("weights", {})
        cache = f", cache {result['cache']}" if "cache" in result else ""
        told.append(f"{made['weights']} in groups of {made['group_size']} (head {made['head']}{cache})")
    return " or ".join(dict.fromkeys(told))


def _limits(results: Sequence[dict[str, Any]]) -> list[str]:
    """Bytes a token, the rate that they allow and the one that was reached, by engine; what the goal comes to."""
    lines = [
        "What an engine must read for a token: all weights but the experts that are not chosen, one row of the",
        "embedding, its cache. The limit is the bandwidth, the rounds' median, over those bytes. The last",
        "columns: how many times llama.cpp's rate moedge would reach at its limit, and so whether the goal can be met.",
        "",
        "| shape | context | engine | read a token | limit, tokens/s | reached | of the limit | ratio at the limit | "
        f"goal {DECODE_GOAL}x |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        for which, context in (("decode", result["prompt_tokens"]), ("decode_long", result["long_context"])):
            for title, peer, found, read in _readers(result, which):
                limit = statistics.median(found["bandwidth_bytes_per_s"]) / read
                reached = statistics.median(rates(found, peer, f"{which}_s", None))
                cells = [result["shape"], f"{context:,}", title, f"{read / 1e6:,.0f} MB", f"{limit:.1f}"]
                share = fraction(found, read, found["peers"][peer][f"{which}_s"])
                cells += [f"{reached:.1f}", f"{share:.0%}", *_reach(found, peer, which, limit)]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _readers(result: dict[str, Any], which: str) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """(title, engine, its measurement, bytes a token) of those that were measured with this context."""
    yield OURS, OURS, result, result["bytes_per_token"][which]
    if "int4_head" in result:
        yield f"{OURS}, int4 head", OURS, result["int4_head"], result["int4_head"]["bytes_per_token"][which]
    if "peer_bytes_per_token" in result:
        yield THEIRS, THEIRS, result, result["peer_bytes_per_token"][THEIRS][which]
    genai = result.get("genai", {})
    if which in genai.get("bytes_per_token", {}):
        yield "genai", "genai", genai, genai["bytes_per_token"][which]


def _reach(found: dict[str, Any], peer: str, which: str, limit: float) -> list[str]:
    """How many times llama.cpp's rate the limit is, and whether that is the goal's; nothing for peers."""
    if peer != OURS:
        return ["", ""]
    ratio = limit / statistics.median(rates(found, THEIRS, f"{which}_s", None))
    return [f"{ratio:.2f}", "memory allows it" if ratio >= DECODE_GOAL else "beyond the memory"]


def _int4_head(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "`moedge export --head int4`, where the head is much of what a token reads (docs/quantization.md has what that",
        "costs in quality); all else as above, in rounds of its own.",
        "",
    ]
    rows = [dict(result["int4_head"], shape=result["shape"]) for result in results]
    for title, key, tokens, goal in WHAT:
        lines += [f"{title[0].upper()}{title[1:]}:", "", *_table(rows, key, tokens, goal), ""]
    return lines[:-1]


def _memory(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "After the long context was filled. Resident: the engine's pages in memory, each counted once; private: those",
        "that no other process can share, as files that are mapped are shared.",
        "",
        "| shape | | load | resident | of it private |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in results:
        for peer, found in result["peers"].items():
            size = [f"{found['memory'].get(key, 0) / 2**30:.1f} GiB" for key in ("resident_bytes", "private_bytes")]
            lines.append(f"| {result['shape']} | {peer} | {found['about']['load_s']:.1f} s | {' | '.join(size)} |")
    return lines


def _genai(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "onnxruntime-genai runs the same int4 weights, out of the engine's folder, with onnxruntime's own operators;",
        "rounds as above, at the short context. A ratio above 1 is in moedge's favour.",
        "",
        "| shape | | moedge tokens/s | genai tokens/s | ratio | least to most | genai loads in | of it private |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        found = result["genai"]
        if "reason" in found:
            lines.append(f"| {result['shape']} | does not run: {_plain(found['reason'])} | | | | | | |")
            continue
        ours, theirs = found["peers"][OURS], found["peers"]["genai"]
        load = f"{theirs['about']['load_s']:.1f} s | {theirs['memory'].get('private_bytes', 0) / 2**30:.1f} GiB"
        for title, key, count in (("prefill", "prefill_s", result["prompt_tokens"]), ("decode", "decode_s", 1)):
            times = [slow / fast for slow, fast in zip(theirs[key], ours[key], strict=True)]
            middle = [count / statistics.median(each[key]) for each in (ours, theirs)]
            cells = [result["shape"], title, *(f"{rate:.1f}" for rate in middle), f"{statistics.median(times):.2f}"]
            lines.append(f"| {' | '.join(cells)} | {min(times):.2f} to {max(times):.2f} | {load} |")
    ran = [result["genai"]["peers"]["genai"]["about"] for result in results if "peers" in result["genai"]]
    versions = {about["version"] for about in ran}
    return [*lines, *(["", f"Versions: {', '.join(sorted(versions))}."] if versions else [])]


def _batch(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "Each sequence brings experts of its own: a step must read as many distinct ones as eight even choices are",
        "expected to call on. The limit is what the memory allows when those are read once.",
        "",
        "| shape | sequences | tokens/s of one | tokens/s of all | ratio | distinct experts, expected | read a step | "
        "of the memory limit | goal 80% |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        found = result["batch"]
        one, step = statistics.median(found["decode_s"]), statistics.median(found["step_s"])
        share = fraction(found, found["bytes_per_step"], found["step_s"])
        distinct = f"{found['expected_distinct_experts']:.1f} of {found['experts']}"
        pairs = zip(found["decode_s"], found["step_s"], strict=True)
        times = statistics.median(found["lanes"] * alone / together for alone, together in pairs)
        cells = [result["shape"], str(found["lanes"]), f"{1 / one:.1f}", f"{found['lanes'] / step:.1f}", f"{times:.2f}"]
        cells += [distinct, f"{found['bytes_per_step'] / 2**30:.2f} GiB", f"{share:.0%}"]
        lines.append(f"| {' | '.join([*cells, 'met' if share >= 0.8 else 'not met'])} |")
    return lines


def _optimum(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "What optimum-onnx makes of each family, tried on a small random checkpoint of it; where its graph gives",
        "transformers' logits, that checkpoint is measured: tokens a second in fp32, and moedge's of the same weights.",
        "",
        "| family | exported | largest difference of a logit | | optimum | moedge, fp32 | moedge, int4 |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for result in {each["optimum"].get("family", each["shape"]): each for each in results}.values():
        found = result["optimum"]
        family = found.get("family", result["shape"])
        exported = f"in {found['export_s']:.0f} s" if found["exported"] else "no"
        off = f"{found['largest_difference']:.1e}" if "largest_difference" in found else ""
        if "peers" not in found:
            lines.append(f"| {family} | {exported} | {off} | {_plain(found['reason'])} | | | |")
            continue
        for title, key, count in (("prefill", "prefill_s", found["prompt_tokens"]), ("decode", "decode_s", 1)):
            cells = [f"{count / statistics.median(each[key]):.1f}" for each in found["peers"].values()]
            lines.append(f"| {family} | {exported} | {off} | {title} | {' | '.join(cells)} |")
    known = [result["optimum"]["versions"] for result in results if "versions" in result["optimum"]]
    told = dict.fromkeys(f"{name} {version}" for versions in known for name, version in versions.items())
    return [*lines, "", f"Versions: {', '.join(told)}."] if told else lines


def _plain(text: str) -> str:
    """Text that ends no cell."""
    return " ".join(text.replace("|", "/").split())


def _processor(result: dict[str, Any]) -> str:
    model = result["machine"].get("cpu_model")  # earlier results have none
    return f"{result['machine']['cpu']}{f' ({model})' if model else ''}, {result['threads']} threads"


def _processors(results: Sequence[dict[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(map(_processor, results)))


def _machine(result: dict[str, Any]) -> str:
    bandwidth = statistics.median(result["bandwidth_bytes_per_s"]) / 1e9
    other = result["peers"][THEIRS]["about"]
    own = result["peers"][OURS]["about"]["kernels"]
    flags = ", ".join(part.split("=")[0].strip() for part in other.get("system", "").split("|") if "= 1" in part)
    return (
        f"{result['shape']}, {result['date']}: {_processor(result)}, "
        f"{bandwidth:.1f} GB/s read in the same rounds, load average before {result['load_before']:.1f}; onnxruntime "
        f"{result['backend_version']}, kernels {own}; {other['version']} ({flags})"
    )


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars by shape: prefill and decode, ours beside theirs, the rounds' range as a line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "moedge", "font.size": 9, "text.color": _INK})
    figure, axes = pyplot.subplots(1, len(WHAT), figsize=(9.6, 0.9 + 0.75 * len(results)), sharey=True)
    for axis, (title, key, tokens, _) in zip(axes, WHAT, strict=True):
        for place, result in enumerate(results):
            for peer, color, offset in ((OURS, _OURS, -0.19), (THEIRS, _THEIRS, 0.19)):
                values = rates(result, peer, key, tokens)
                middle = statistics.median(values)
                axis.barh(place + offset, middle, 0.34, color=color, label=peer if not place else None)
                axis.plot([min(values), max(values)], [place + offset] * 2, color=_INK, linewidth=1)
                axis.text(max(values), place + offset, f"  {middle:.0f}", va="center", fontsize=8)
        axis.set_title(f"{title}, tokens/s", fontsize=9, loc="left")
        axis.margins(x=0.18)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0].set_yticks(range(len(results)), [result["shape"] for result in results])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower right", ncols=2, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

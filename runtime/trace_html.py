"""The trace as one HTML file that fetches nothing: heat maps, load figures, tokens coloured by expert.

Heat maps, figures and comparison are there without a script; the inline script colours the tokens of the layer that
the reader chooses. Colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .report import number, percent
from .report_style import STYLE
from .trace import Trace, TracedText
from .trace_load import Load

# A cell's colour by its load over an even one: above each of these it is one step darker.
_HEAT = (0.0, 0.25, 0.5, 0.75, 1.25, 2.0, 3.0, 5.0)
_HEAT_SAID = ("unused", "up to ¼", "½", "¾", "even, to 1¼", "2", "3", "5", "more")
# And of a difference between two texts, in even loads.
_DIFFERENCE = (0.1, 0.5, 1.0, 2.0)
_CELL = 10


def render_html(traced: Trace) -> str:
    """The whole document."""
    model = escape(str(traced.described["model"]))
    parts = [
        _header(traced),
        _section("Load by layer and expert", _maps(traced), _MAP_NOTE),
        _section("How even the load is", _balance(traced), _BALANCE_NOTE),
        _section("What differs between the texts", _comparison(traced), _COMPARISON_NOTE) if traced.comparison else "",
        _section("Tokens by expert", _tokens(traced), _TOKENS_NOTE),
        _section("Attention", _attention(traced), _ATTENTION_NOTE) if traced.texts[0].attention else "",
        _section("How this was made", _made(traced)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>Expert trace: {model}</title>\n<style>{STYLE}{_beside('trace.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f'\n</main>\n<script id="data" type="application/json">{_data(traced)}</script>\n'
        f"<script>{_beside('trace.js')}</script>\n</body>\n</html>\n"
    )


_MAP_NOTE = (
    "Each cell is one expert of one layer: the stronger its colour, the more of the tokens' assignments went to it."
)
_BALANCE_NOTE = (
    "Mean load over the largest (1: all experts are used alike), entropy of the shares over its largest value, "
    "coefficient of variation (0: alike), and experts that no token took. Short texts are uneven by chance."
)
_COMPARISON_NOTE = (
    "Total variation: the share of assignments that would have to move to make the loads the same (0 to 1). "
    "Short texts differ by chance."
)
_ATTENTION_NOTE = (
    "Row by row the tokens that look, column by column those they look at; the darker, the more. Colour grows with the "
    "square root of the weight, so that faint looks are seen too."
)
_TOKENS_NOTE = "A token's colour is the expert it took in the chosen layer; the stronger, the larger its weight."


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _header(traced: Trace) -> str:
    described = traced.described
    count = sum(len(text.ids) for text in traced.texts)
    facts = [
        f"{traced.top_k} of {traced.num_experts} experts for each token",
        f"{len(traced.layers)} MoE layer{'s' if len(traced.layers) > 1 else ''}",
        f"{described['weights']} weights, engine {described['profile']}",
        f"{count:,} tokens traced",
    ]
    names = "".join(
        f'<p class="facts"><b>{f"Text {index}: " if len(traced.texts) > 1 else ""}</b>{escape(text.name)} '
        f"({_extent(text)})</p>"
        for index, text in enumerate(traced.texts, start=1)
    )
    return (
        f'<header><p class="eyebrow">Expert trace · {escape(str(described["created"])[:10])}</p>'
        f'<h1>{escape(str(described["model"]))}</h1><p class="facts">{escape(" · ".join(facts))}</p>{names}</header>'
    )


def _extent(text: TracedText) -> str:
    if len(text.ids) == text.total_tokens:
        return f"{len(text.ids):,} tokens"
    return f"the first {len(text.ids):,} of {text.total_tokens:,} tokens"


def _maps(traced: Trace) -> str:
    several = len(traced.texts) > 1
    maps = [
        _map(traced, [[_heat(value * traced.num_experts) for value in row.share] for row in text.loads],
             f"Text {index}: {text.name}" if several else "")
        for index, text in enumerate(traced.texts, start=1)
    ]  # fmt: skip
    body = "".join(maps) + _scale([(f"h{step}", said) for step, said in enumerate(_HEAT_SAID)], "times an even load:")
    if several:
        pairs = zip(traced.texts[0].loads, traced.texts[1].loads, strict=True)
        cells = [[_difference(value * traced.num_experts) for value in two.share - one.share] for one, two in pairs]
        body += _map(traced, cells, "Difference: text 2 less text 1")
        steps = [("l4", "much less"), ("l2", "less"), ("z0", "alike"), ("m2", "more"), ("m4", "much more in text 2")]
        body += _scale(steps, "")
    hint = "" if several else "Point at a cell or tap it to read it."
    return body + f'<p class="readout" id="readout" role="status">{hint}</p>'


def _map(traced: Trace, cells: Sequence[Sequence[str]], title: str) -> str:
    """Layers as rows, experts as columns; runs of equal cells are one rectangle."""
    width, rows = traced.num_experts, len(traced.layers)
    drawn = []
    for row, line in enumerate(cells):
        start = 0
        for column in range(1, width + 1):
            if column == width or line[column] != line[start]:
                if line[start] not in ("h0", "z0"):
                    place = f'x="{start}" y="{row}" width="{column - start}" height="1"'
                    drawn.append(f'<rect class="{line[start]}" {place}/>')
                start = column
    height = min(26, max(_CELL, 240 // rows))
    every = max(1, -(-14 * rows // (height * rows)))
    labels = "".join(f"<span>{layer if index % every == 0 else ''}</span>" for index, layer in enumerate(traced.layers))
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<div class="map">{head}<div class="body"><div class="layers" aria-hidden="true">{labels}</div>'
        f'<div class="scroll" tabindex="0"><svg data-map viewBox="0 0 {width} {rows}" preserveAspectRatio="none" '
        f'height="{height * rows}" style="--least:{4 * width}px" role="img" '
        f'aria-label="heat map of {rows} layers by {width} experts; the figures are in the table below">'
        f'{"".join(drawn)}</svg></div><div></div><div class="axis"><span>expert 0</span><span>layers downwards</span>'
        f"<span>{width - 1}</span></div></div></div>"
    )


def _heat(ratio: float) -> str:
    return f"h{sum(ratio > bound for bound in _HEAT)}"


def _difference(ratio: float) -> str:
    step = sum(abs(ratio) > bound for bound in _DIFFERENCE)
    return f"{'m' if ratio > 0 else 'l'}{step}" if step else "z0"


def _scale(steps: Sequence[tuple[str, str]], title: str) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true"><rect class="{name}" width="1" '
        f'height="1"/></svg>{escape(said)}</li>'
        for name, said in steps
    )
    return f'<ul class="scale"><li>{escape(title)}</li>{items}</ul>' if title else f'<ul class="scale">{items}</ul>'


def _balance(traced: Trace) -> str:
    several = len(traced.texts) > 1
    headings = ("mean/max", "entropy", "CV", "unused")
    groups = "".join(
        f'<th scope="colgroup" colspan="4" class="group first">Text {index}</th>'
        for index in range(1, len(traced.texts) + 1)
    )
    head = f"<tr><td></td>{groups}</tr>" if several else ""
    names = "".join(
        f'<th scope="col"{" class=first" if several and name == headings[0] else ""}>{name}</th>'
        for _ in traced.texts
        for name in headings
    )
    body = []
    for index, layer in enumerate(traced.layers):
        cells = "".join(_balance_cells(text.loads[index], several) for text in traced.texts)
        body.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    table = (
        f'<table class="balance"><thead>{head}<tr><th scope="col">Layer</th>{names}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    return f'<div class="wide" tabindex="0">{table}</div>'


def _balance_cells(load: Load, several: bool) -> str:
    width = f"{100 * load.mean_over_max:.1f}%"
    meter = f'<span class="meter" aria-hidden="true"><i style="width:{width}"></i></span>'
    first = ' class="first"' if several else ""
    return (
        f"<td{first}>{number(load.mean_over_max)}{meter}</td><td>{number(load.entropy)}</td>"
        f"<td>{number(load.variation)}</td><td>{load.unused}</td>"
    )


def _comparison(traced: Trace) -> str:
    found: dict[str, Any] = traced.comparison or {}
    layers = "".join(
        f'<tr><th scope="row">{row["layer"]}</th><td>{number(row["total_variation"])}</td>'
        f"<td>{number(row['jensen_shannon_bits'])}</td></tr>"
        for row in found["layers"]
    )
    largest = "".join(
        f'<tr><th scope="row">{row["layer"]} / {row["expert"]}</th><td>{percent(row["shares"][0])}</td>'
        f"<td>{percent(row['shares'][1])}</td></tr>"
        for row in found["largest"]
    )
    return (
        f'<p>Over all layers the total variation is {number(found["mean_total_variation"])} on average.</p>'
        '<div class="pair"><div><table class="balance"><thead><tr><th scope="col">Layer</th><th scope="col">Total '
        'variation</th><th scope="col">Jensen-Shannon, bits</th></tr></thead>'
        f'<tbody>{layers}</tbody></table></div><div><table class="balance"><thead><tr><th scope="col">Layer / expert'
        '</th><th scope="col">Text 1</th><th scope="col">Text 2</th></tr></thead>'
        f"<tbody>{largest}</tbody></table></div></div>"
    )


def _tokens(traced: Trace) -> str:
    layers = "".join(f'<option value="{index}">{layer}</option>' for index, layer in enumerate(traced.layers))
    ranks = "".join(f'<option value="{place}">{place + 1}</option>' for place in range(traced.top_k))
    several = len(traced.texts) > 1
    boxes = "".join(
        f'<div class="text">{f"<h3>Text {index + 1}: {escape(text.name)}</h3>" if several else ""}'
        f'<div class="tokens" id="tokens-{index}" tabindex="0"></div></div>'
        for index, text in enumerate(traced.texts)
    )
    return (
        '<noscript><p class="note">Colouring the tokens needs the script of this page.</p></noscript>'
        f'<div class="controls"><label>Layer <select id="layer">{layers}</select></label>'
        '<span class="step"><button id="earlier" aria-label="layer before">◀</button>'
        '<button id="later" aria-label="layer after">▶</button></span>'
        f'<label>Choice <select id="rank">{ranks}</select></label>'
        '<label><input type="checkbox" id="numbers"/> expert numbers</label></div>'
        '<ul class="experts" id="experts" aria-label="experts of this layer and their share of the tokens"></ul>'
        f'<p class="detail" id="detail" role="status"></p><div class="{"pair" if several else "single"}">{boxes}</div>'
    )


def _attention(traced: Trace) -> str:
    several = len(traced.texts) > 1
    parts = []
    for index, text in enumerate(traced.texts):
        count = len(text.attention[0].weights)
        title = f"Text {index + 1}: {escape(text.name)}, " if several else ""
        figures = "".join(
            f'<figure><canvas data-look="{index},{place}" width="{count}" height="{count}" role="img" '
            f'aria-label="attention of layer {look.layer}, head {look.head}"></canvas>'
            f"<figcaption>layer {look.layer}, head {look.head}</figcaption></figure>"
            for place, look in enumerate(text.attention)
        )
        parts.append(f'<h3>{title}{count:,} tokens</h3><div class="looks">{figures}</div>')
    hint = "Point at a picture or tap it to read it."
    return (
        '<noscript><p class="note">Drawing attention needs the script of this page.</p></noscript>'
        f'<p class="readout" id="look" role="status">{hint}</p>{"".join(parts)}'
    )


def _made(traced: Trace) -> str:
    described, overhead = traced.described, traced.overhead
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    cost = overhead["traced_ms"] - overhead["plain_ms"]
    share = cost / overhead["plain_ms"] if overhead["plain_ms"] else 0.0
    told = "nothing that could be measured" if cost <= 0 else f"{cost:.2f} ms ({percent(share)})"
    lines = (
        f"Engine {described['profile']} ({described['backend']}) on {described['device']}; {versions}; "
        f"{described['created']}.",
        f"Reading the routes cost {told} over a pass of {overhead['tokens']:,} tokens that takes "
        f"{overhead['plain_ms']:.2f} ms. Without tracing nothing is read.",
    )
    return f'<ul class="made">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def _roots(weights: NDArray[np.float32]) -> str:
    """Square roots of the weights [T, T], 0 to 255, row by row."""
    return base64.b64encode(np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8).tobytes()).decode()


def _data(traced: Trace) -> str:
    """What the script needs, safe inside a script element."""
    texts = []
    for text in traced.texts:
        # The strongest first, whatever order the gate gave.
        order = np.argsort(-text.routing.weights, axis=-1, kind="stable")
        experts = np.take_along_axis(text.routing.experts, order, -1)
        weights = np.take_along_axis(text.routing.weights, order, -1).astype(np.float64)
        shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
        texts.append(
            {
                "pieces": text.pieces,
                "ids": text.ids,
                "experts": base64.b64encode(experts.astype("<u2").tobytes()).decode(),
                "weights": base64.b64encode(np.rint(255 * shares).astype(np.uint8).tobytes()).decode(),
                "counts": [[int(count) for count in row.counts] for row in text.loads],
                "looks": [
                    {"layer": look.layer, "head": look.head, "roots": _roots(look.weights)} for look in text.attention
                ],
            }
        )
    document = {
        "layers": list(traced.layers),
        "experts": traced.num_experts,
        "k": traced.top_k,
        "texts": texts,
    }
    return json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")

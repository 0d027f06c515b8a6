"""What `moedge bench` and `moedge inspect` print for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


def bench_table(result: dict[str, Any]) -> Table:
    """A bench result, a line for each figure."""
    title = f"{result['model']} {result['weights']} on {result['device']} ({result['profile']}, {result['backend']})"
    table = _plain(title)
    repeats = f"{result['repeat']} runs of {result['prompt_tokens']} prompt and {result['new_tokens']} new tokens"
    if result["context_tokens"]:
        repeats += f" behind {result['context_tokens']}"
    table.add_row("measured", f"{repeats}, batch {result['batch']}, {result['threads']} threads, 1 to warm up")
    table.add_row("load", f"{result['load_s']:.2f} s")
    table.add_row("time to first token", _percentiles(result["ttft_ms"]))
    table.add_row("inter-token latency", _percentiles(result["itl_ms"]))
    table.add_row("over the repeats", _over_repeats(result["spread"]))
    table.add_row("prefill", f"{result['prefill_tokens_per_s']:,.1f} tokens/s")
    table.add_row("decode", f"{result['decode_tokens_per_s']:,.1f} tokens/s")
    peak = result["peak_memory_bytes"]
    table.add_row("peak memory", "unknown" if peak is None else size(peak))
    if result["device_memory_bytes"] is not None:
        table.add_row("memory of the GPU", size(result["device_memory_bytes"]))
    table.add_row("bundle", size(result["bundle_bytes"]))
    table.add_row("least read for a token", size(result["bytes_per_token"]))
    limit, share = result["bandwidth_limit_bytes_per_s"], f"limit {result['bandwidth_limit_source']}"
    if limit is not None:
        told = f"{100 * result['fraction_of_limit']:.0f}% of {limit / 1e9:.1f} GB/s"
        share = f"{told}, {result['bandwidth_limit_source']}"
    table.add_row("memory bandwidth", f"{result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s, {share}")
    if result["limit_note"]:
        table.add_row("", result["limit_note"])
    energy = result["energy_j_per_token"]
    told = result["energy_reason"] if energy is None else f"{energy:.3f} J/token ({result['energy_source']})"
    table.add_row("energy", told)
    return table


def _over_repeats(spread: dict[str, dict[str, float]]) -> str:
    """The least and the most of the repeats' own figures."""
    names = {"ttft_ms": "first token", "itl_p50_ms": "between p50", "itl_p90_ms": "p90", "itl_p99_ms": "p99"}
    told = [f"{name} {spread[key]['min']:.2f} to {spread[key]['max']:.2f}" for key, name in names.items()]
    return f"{', '.join(told)} ms"


def model_table(document: dict[str, Any]) -> Table:
    """Model, gating, quantization and provenance of an inspected bundle."""
    model, config, quantization = document["model"], document["config"], document["quantization"]
    table = _plain(f"{model.get('name', document['bundle'])} ({model.get('family', 'unknown family')})")
    table.add_row("parameters", f"{model.get('parameters') or 0:,}, active {model.get('active_parameters') or 0:,}")
    attention = config["attention"]["kind"]
    layers = f"{config['num_hidden_layers']} of width {config['hidden_size']}, attention {attention}"
    table.add_row("layers", layers)
    table.add_row("vocabulary, positions", f"{config['vocab_size']:,}, {config['max_position_embeddings']:,}")
    moe = config["moe"]
    if moe["layers"]:
        experts = f"{moe['num_experts']}, {moe['num_experts_per_tok']} for each token, in {len(moe['layers'])} layers"
        table.add_row("experts", experts)
    for gate in document["gating"] or []:
        table.add_row("gate", _describe_gate(gate))
    algorithm = quantization.get("algorithm")
    how = f", group {quantization.get('group_size')}, {algorithm}" if algorithm else ""
    table.add_row("weights", f"{quantization.get('weights')}{how}")
    source = document["provenance"] or {}
    table.add_row("made from", f"{source.get('source')}, {source.get('created')}, moedge {source.get('moedge')}")
    return table


def sizes_table(document: dict[str, Any]) -> Table:
    """Bytes of the weights by class, with how each is stored where the manifest says so."""
    table = Table(title="weights", title_justify="left")
    for name in ("class", "stored as", "rounding\nerror", "size", "share"):
        table.add_column(name, justify="left" if name in ("class", "stored as") else "right")
    classes = document["quantization"].get("classes") or {}
    total = sum(document["sizes"].values())
    for name, count in document["sizes"].items():
        if not count:
            continue
        stored = classes.get(name, {})
        error = stored.get("relative_error")
        group = f", group {stored['group_size']}" if stored.get("group_size") else ""
        scales = [f"{bits}-bit scales" for bits in (8, 16) if stored.get(f"float{bits}_scales")]
        kind = "; ".join([", ".join([f"{stored.get('dtype', '')}{group}", *scales]), *stored.get("also", [])])
        share = f"{100 * count / total:.1f}%"
        table.add_row(name, kind, "" if error is None else f"{100 * error:.2f}%", size(count), share)
    table.add_row("all", "", "", size(total), "", style="bold")
    return table


def engines_table(document: dict[str, Any]) -> Table:
    """The engines of an inspected bundle and which run on this machine; below, why not, or with which kernels."""
    table = Table(title="engines", title_justify="left")
    for name in ("profile", "status", "backend", "context", "size", "here"):
        table.add_column(name, justify="right" if name in ("context", "size") else "left")
    for engine in document["engines"]:
        here = "runs" if engine["runs_here"] else "no"
        if "backend" in engine:
            backend = f"{engine['backend']} {engine['backend_version']}"
            table.add_row(
                engine["profile"], engine["status"], backend, str(engine["max_seq_len"]), size(engine["bytes"]), here
            )
        else:
            table.add_row(engine["profile"], engine["status"], "", "", "", here)
    if not document["engines"]:
        table.add_row("none", "", "", "", "", f"moedge build {document['bundle']} --profile cpu")
    notes = [_note(engine) for engine in document["engines"]]
    if any(notes):
        table.caption = Text("\n".join(note for note in notes if note))
        table.caption_justify = "left"
    return table


def _note(engine: dict[str, Any]) -> str:
    """Why an engine does not run here, or what computes it, where there is a choice."""
    if not engine["runs_here"]:
        return str(engine["reason"])
    made_by, why = engine.get("kernels"), engine.get("why_not_own_kernels")
    if not made_by:
        return ""
    return f"{engine['profile']}: its kernels here are {made_by}{f' ({why})' if why else ''}\n  {engine['precision']}"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _describe_gate(gate: dict[str, Any]) -> str:
    attributes = ", ".join(f"{name} {value:g}" for name, value in gate["attributes"].items())
    over = f" over {_describe_gate(gate['over'])}" if "over" in gate else ""
    return f"{gate['op']} ({attributes}){over}"


def _plain(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _percentiles(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.2f}" for name, value in values.items()) + " ms"

"""`moedge verify`. It stands here and not in runtime because `--deep` lowers networks again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bundle import Bundle
from ..errors import BundleError
from ..progress import Progress, console_progress

if TYPE_CHECKING:
    from ..runtime.verify import Verdict
    from .deep import Deep


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Run a few tokens: does each engine route as the canonical graph does?")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify_command(bundle: Path, deep: bool, as_json: bool) -> None:
    """Checks every checksum, every expert, and the engines' preflight on this machine."""
    from ..runtime.verify import verify

    opened = Bundle.open(bundle)
    with console_progress() as progress:
        verdict = verify(opened, progress)
        routes = _follow_routes(opened, verdict, progress) if deep else None
    if as_json:
        document = {"bundle": str(bundle), **verdict.to_json()}
        click.echo(json.dumps(document | ({"deep": routes.to_json()} if routes else {}), indent=1))
        verdict.raise_for_faults()
        return
    _print(verdict, routes)
    if verdict.faults:
        count = "1 fault" if len(verdict.faults) == 1 else f"{len(verdict.faults)} faults"
        raise BundleError(f"{bundle}: {count}, listed above with what mends it")


def _follow_routes(bundle: Bundle, verdict: Verdict, progress: Progress | None) -> Deep:
    """The routes of every engine that is whole; what is found there joins the verdict."""
    from .deep import verify_routes

    routes = verify_routes(bundle, [name for name, state in verdict.engines.items() if state["ok"]], progress)
    verdict.faults += routes.faults
    verdict.unchecked += routes.unchecked
    return routes


def _print(verdict: Verdict, routes: Deep | None) -> None:
    files = f"{verdict.files} files ({verdict.bytes / 2**20:,.1f} MiB)"
    engines = "1 engine" if len(verdict.engines) == 1 else f"{len(verdict.engines)} engines"
    click.echo(f"{files}, {verdict.experts} experts, {engines}")
    for profile, state in verdict.engines.items():
        # A fault of its own stands below, once.
        told = "runs here" if state["runs_here"] else "" if state["reason"] in verdict.faults else state["reason"]
        sound = "ok" if state["runs_here"] else "files ok" if state["ok"] else "damaged"
        click.echo(f"engine {profile}: " + "; ".join(filter(None, [sound, told])))
    for line in _describe_deep(routes) if routes else []:
        click.echo(line)
    for line in verdict.unchecked:
        click.echo(f"not checked: {line}")
    for line in verdict.faults:
        click.echo(f"fault: {line}")


def _describe_deep(routes: Deep) -> list[str]:
    """What was compared, how much, and what came of it; how experts run, where several layers do alike once."""
    if not routes.engines:
        return []
    lines = [
        f"routes: {routes.tokens} random tokens through {routes.layers} of {routes.of_layers} layers of the canonical "
        "graph and of each engine; compared is which experts a gate chooses"
    ]
    for profile, found in routes.engines.items():
        layers = found["layers"]
        if not layers:
            continue
        last = layers[-1]
        alike = f"layer {last['layer']} differs" if last["fault"] else "all alike"
        elsewhere, near = (sum(each[key] for each in layers) for key in ("tokens_elsewhere", "near_ties"))
        lines.append(
            f"routes of {profile}: {routes.tokens * len(layers)} choices in {len(layers)} layers, by {found['how']}, "
            f"compared with the gate's reference {last['compared']}: {alike}, {near} near ties; {elsewhere} tokens "
            "elsewhere than in the canonical graph, by rounding before the router"
        )
        texts = dict.fromkeys(each["experts"] for each in layers)
        lines += [f"experts of {profile}: {text}" for text in texts if text]
    good = "each engine takes the model's routes" if not routes.faults else "not every engine takes the model's routes"
    return [*lines, f"routes: {good}"]

"""`moedge profiles` and `moedge estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle import Bundle
from .device import DeviceProfile, list_profiles, load_profile
from .estimate import estimate
from .fit import Fit, check_fit, size
from .shape import KV_CACHE_DEFAULT, cache_element_bytes

if TYPE_CHECKING:
    from rich.table import Table


_WIDE = 120  # columns


@click.command("profiles")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def profiles_command(name: str | None, as_json: bool) -> None:
    """Lists device profiles, or shows one (a name, or a path that ends in .toml) with the sources of its figures."""
    if name is not None:
        profile = load_profile(name)
        if as_json:
            click.echo(json.dumps(profile.to_json(), indent=1))
        else:
            _print_profile(profile)
        return
    profiles = [load_profile(each) for each in list_profiles()]
    if as_json:
        click.echo(json.dumps([profile.to_json() for profile in profiles], indent=1))
    else:
        from rich.console import Console

        console = Console()
        console.print(_list_table(profiles, console.width))


@click.command("estimate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", "names", multiple=True, required=True, metavar="NAME", help="Device; can be repeated.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="[default: 512, or what --max-seq-len leaves]")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--batch", "--max-batch", "batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."
)
@click.option("--max-seq-len", type=click.IntRange(1), help="Room in the KV cache. [default: prompt and new tokens]")
@click.option("--kv-cache", metavar="TYPE", help=f"On a CPU: fp32, fp16 or int8. [default: {KV_CACHE_DEFAULT}]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout (a list for several profiles).")
def estimate_command(
    bundle: Path,
    names: tuple[str, ...],
    prompt_tokens: int | None,
    new_tokens: int,
    batch: int,
    max_seq_len: int | None,
    kv_cache: str | None,
    as_json: bool,
) -> None:
    """Fit and predicted latency of BUNDLE on devices that are not here."""
    manifest = Bundle.open(bundle).manifest
    devices = [_measured(load_profile(name)) for name in dict.fromkeys(names)]
    results = [
        estimate(
            manifest,
            device,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            max_seq_len=max_seq_len,
            kv_cache=kv_cache,
        )
        for device in devices
    ]
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else results, indent=1))
        return
    from ..runtime.report import render_table

    length = results[0]["fit"]["max_seq_len"]
    elements = [cache_element_bytes(manifest, device.target, kv_cache) for device in devices]
    fits = [
        check_fit(manifest, device, batch, length, cache_bytes_per_element=element)
        for device, element in zip(devices, elements, strict=True)
    ]
    _print(render_table(results))
    _print(fit_table(fits))
    for device, fit in zip(devices, fits, strict=True):
        if not fit.fits:
            click.echo(fit.explain())
        for line in _remarks(device):
            click.echo(line)


def fit_table(fits: list[Fit]) -> Table:
    """Devices as rows, the parts of the memory as columns."""
    from rich import box
    from rich.table import Table

    # 80 columns hold it with the longest of the shipped names.
    table = Table(title="Memory", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("profile", no_wrap=True)
    for what, _, _ in fits[0].rows():
        heading = {"workspace": "work-\nspace", "available": "avail-\nable"}.get(what, what)
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits")
    for fit in fits:
        table.add_row(
            fit.profile,
            *(size(count) for _, count, _ in fit.rows()),
            "[green]yes[/green]" if fit.fits else "[red]no[/red]",
        )
    return table


def _measured(device: DeviceProfile) -> DeviceProfile:
    """This machine's bandwidth is measured (a second); everybody else's is the profile's."""
    if not device.this_machine:
        return device
    from ..runtime.machine import measure_bandwidth

    return device.with_bandwidth(measure_bandwidth(device.cores or 1), "measured on this machine")


def _remarks(device: DeviceProfile) -> list[str]:
    return [f"{device.name}: {device.notes}"] if device.notes and not device.this_machine else []


def _list_table(profiles: list[DeviceProfile], width: int) -> Table:
    """One line a profile; what the devices call themselves only where there is room."""
    from rich import box
    from rich.table import Table

    wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("profile", no_wrap=True)
    if wide:
        table.add_column("device", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for heading in ("SM", "memory", "bandwidth", "power"):
        table.add_column(heading, justify="right", no_wrap=True)
    for profile in profiles:
        capability = profile.compute_capability
        table.add_row(
            profile.name,
            *([profile.title] if wide else []),
            profile.target,
            f"{capability[0]}.{capability[1]}" if capability else "-",
            size(profile.memory_bytes),
            f"{profile.bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            f"{profile.power_w:g} W" if profile.power_w is not None else "-",
        )
    return table


def _print_profile(profile: DeviceProfile) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{profile.name}: {profile.title}", title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source")
    for key, value in profile.figures().items():
        style = "yellow" if profile.is_assumption(key) else ""
        table.add_row(key, _readable(key, value), Text(profile.sources.get(key, "no source given"), style=style))
    _print(table)
    shared = "shared by CPU and GPU" if profile.memory_shared else "the device's own"
    click.echo(
        f"{profile.kind} of {profile.vendor}, target {profile.target}, memory {shared}, figures as of {profile.as_of}"
    )
    if profile.notes:
        click.echo(profile.notes)


def _readable(key: str, value: Any) -> str:
    if key == "compute_capability":
        return f"{value[0]}.{value[1]}"
    if key.startswith("memory") or key == "cache_bytes":
        return size(value)
    if key.startswith("bandwidth"):
        return f"{value / 1e9:,.6g} GB/s"
    if key in ("fp32", "fp16", "int8", "fp8", "fp4"):
        return f"{value / 1e12:,.4g} T/s"
    units = {"power_w": " W", "price_usd_per_hour": " USD/h", "launch_overhead_us": " us"}
    return f"{value:g}{units.get(key, '')}"


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)

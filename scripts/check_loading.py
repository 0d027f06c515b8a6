"""Loading an engine, judged: exit code 1 where a bar is missed. Not part of the tests.

    python scripts/check_loading.py BUNDLE --loads 1000          memory, threads and descriptors stay as they are
    python scripts/check_loading.py BUNDLE --within 2 --share    a warm load's time; processes share the weights

BUNDLE is loaded as `with moedge.load(BUNDLE)`, in processes of its own, and every load makes a few tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import explain_missing  # noqa: F401
from verdicts import FLAT, Verdict, leave, show

WARM = 3  # loads, of which the last counts
OWN = 256 << 20  # bytes that a process has beside weights: Python, onnxruntime, a context

LOADS = """
import json, os, re, sys, moedge

def state():
    text = open("/proc/self/status").read()
    found = {name: int(re.findall(rf"^{name}:\\s*(\\d+)", text, re.M)[0]) for name in ("VmRSS", "Threads")}
    return {**found, "files": len(os.listdir("/proc/self/fd"))}

states = []
for place in range(int(sys.argv[2])):
    with moedge.load(sys.argv[1]) as engine:
        list(engine.generate([1, 2, 3], max_new_tokens=3))
    if place % 10 == 9:
        states.append(state())
print(json.dumps(states))
"""

LOAD = """
import sys, time, moedge
began = time.perf_counter()
with moedge.load(sys.argv[1]) as engine:
    seconds = time.perf_counter() - began
    list(engine.generate([1, 2, 3], max_new_tokens=16))
    print(seconds, flush=True)
    sys.stdin.readline()
"""


def check_loads(bundle: str, count: int) -> list[Verdict]:
    """Load and let go `count` times in one process."""
    command = [sys.executable, "-c", LOADS, bundle, str(count)]
    states = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    first, last = states[len(states) // 10], states[-1]
    growth = last["VmRSS"] / first["VmRSS"] - 1
    return [
        Verdict(
            f"{count:,} loads: resident memory flat within {FLAT:.0%}",
            f"{first['VmRSS'] >> 10} MiB after {count // 10 + 10}, {last['VmRSS'] >> 10} MiB after all, {growth:+.1%}",
            growth <= FLAT,
        ),
        Verdict(
            f"{count:,} loads: no more threads and descriptors",
            f"{first['Threads']} and {last['Threads']} threads, {first['files']} and {last['files']} descriptors",
            last["Threads"] <= first["Threads"] and last["files"] <= first["files"],
        ),
    ]


def start(bundle: str) -> tuple[subprocess.Popen[str], float]:
    """A process with the bundle loaded, and the seconds that the load took."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", LOAD, bundle], text=True, **pipes)
    assert process.stdout is not None
    return process, float(process.stdout.readline())


def check_time(bundle: str, within: float) -> list[Verdict]:
    """The time of a load whose files the system has in memory."""
    seconds = []
    for _ in range(WARM):
        process, taken = start(bundle)
        process.communicate("\n")
        seconds.append(taken)
    found = f"{seconds[-1]:.2f} s, after {', '.join(f'{each:.2f}' for each in seconds[:-1])}; weights.bin is "
    found += f"{(Path(bundle) / 'weights.bin').stat().st_size / 1e9:.2f} GB"
    return [Verdict(f"a warm load within {within:g} s", found, seconds[-1] <= within)]


def check_sharing(bundle: str) -> list[Verdict]:
    """Two processes at once: what each maps of weights.bin counts half in each."""
    processes = [start(bundle)[0] for _ in range(2)]
    try:
        parts = [mapped(process.pid) for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")
    shares = [share / resident if resident else 1.0 for resident, share, _ in parts]
    found = "; ".join(
        f"{resident >> 10} MiB of weights.bin resident, {share >> 10} MiB its share, {private >> 10} MiB private in all"
        for resident, share, private in parts
    )
    size = (Path(bundle) / "weights.bin").stat().st_size
    few_private = all(1024 * private < size / 4 + OWN for *_, private in parts)
    fine = all(share < 0.75 for share in shares) and few_private
    return [Verdict("two processes share the weights", found, fine)]


def mapped(pid: int) -> tuple[int, int, int]:
    """KiB: resident of weights.bin, the share of it that counts for this process (Pss), and all private pages."""
    resident = share = private = 0
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith("/weights.bin")
        elif found := re.match(r"(Rss|Pss|Private_Clean|Private_Dirty):\s+(\d+) kB", line):
            name, size = found[1], int(found[2])
            resident += size * (ours and name == "Rss")
            share += size * (ours and name == "Pss")
            private += size * (name.startswith("Private") and not (ours and name == "Private_Clean"))
    return resident, share, private


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--loads", type=int, default=0)
    parser.add_argument("--within", type=float, metavar="SECONDS")
    parser.add_argument("--share", action="store_true")
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    if options.loads:
        verdicts += check_loads(options.bundle, options.loads)
    if options.within is not None:
        verdicts += check_time(options.bundle, options.within)
    if options.share:
        verdicts += check_sharing(options.bundle)
    show(verdicts)
    leave(verdicts)


if __name__ == "__main__":
    main()

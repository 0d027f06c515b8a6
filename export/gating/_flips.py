"""Which flips of the least certain bits can be among the k cheapest: what `BinaryCodeGate` enumerates.

Bits are ranked by the cost of flipping them, rank 1 the cheapest; a set of flips costs the sum. Set A precedes set B
when B has at least as many flips and, both in falling rank, each flip of A ranks no higher than B's in its place. Then
A costs less than B, whatever the costs are: each flip of A is matched by one of B that is as dear or dearer, and what
B has more is positive. (Costs of zero and equal costs are told apart by the expert's index, which adds up over flips
as costs do; see binary_code.) So a set that k others precede is never among the k cheapest, and the candidates for
any k are the sets that fewer than k others precede. None has a rank above k - 1, since the empty set and each single
cheaper flip precede it, nor more than log2(k) flips, since all its subsets precede it. For k = 4 these five remain:
none, 1, 2, 3, and 1 with 2.
"""

from __future__ import annotations

from functools import cache


@cache
def count_preceding(flips: tuple[int, ...]) -> int:
    """How many sets precede `flips` (ranks, falling) or equal it."""
    if not flips:
        return 1
    # By the largest rank the other set has; the rest must precede the rest, below that rank.
    return 1 + sum(count_preceding(_below(flips[1:], first)) for first in range(1, flips[0] + 1))


def _below(flips: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """`flips` with every rank lowered until all are below `limit` and still distinct; ranks of 0 drop out."""
    lowered: list[int] = []
    for rank in flips:
        limit = min(rank, limit - 1)
        if limit <= 0:
            break
        lowered.append(limit)
    return tuple(lowered)


@cache
def list_flips(top_k: int, bits: int) -> tuple[tuple[int, ...], ...]:
    """The sets of ranks (falling, 1 to `bits`) that can be among the `top_k` cheapest, by how many precede them."""
    found: dict[tuple[int, ...], int] = {(): 1}
    fresh: list[tuple[int, ...]] = [()]
    while fresh:
        # Every set is its predecessor with one rank raised by one or a flip of rank 1 added.
        grown = {after for flips in fresh for after in _successors(flips, bits)} - set(found)
        fresh = [flips for flips in grown if count_preceding(flips) <= top_k]
        found.update((flips, count_preceding(flips)) for flips in fresh)
    return tuple(sorted(found, key=lambda flips: (found[flips], flips)))


def _successors(flips: tuple[int, ...], bits: int) -> list[tuple[int, ...]]:
    after = [] if 1 in flips or not bits else [(*flips, 1)]
    for place, rank in enumerate(flips):
        if rank < bits and rank + 1 not in flips:
            after.append((*flips[:place], rank + 1, *flips[place + 1 :]))
    return after

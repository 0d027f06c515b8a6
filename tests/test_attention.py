"""Attention by the ops of `moedge.cpu`: against numpy over random shapes, to the bit among themselves, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attention_cases import (
    Grouped,
    Latent,
    Run,
    dequantized,
    grouped_model,
    make_run,
    model_of,
    open_case,
    pack_rows,
    reference,
    run_model,
    unpack_rows,
)
from kernel_cases import open_model

from moedge.runtime import kernels

CASES: list[Grouped | Latent] = [
    Grouped(8, 2, 64, 32),
    Grouped(3, 3, 128, 64, interleaved=True),
    Grouped(6, 3, 20, 10, window=7, sinks=True),
    Grouped(5, 1, 9, 2, window=300),
    Grouped(8, 1, 24, 4, window=130, sinks=True, interleaved=True, kind="fp16"),
    Grouped(4, 2, 32, 16, kind="fp16"),
    Grouped(4, 2, 40, 20, kind="int8"),
    Grouped(8, 2, 12, 6, sinks=True, kind="int8"),
    Latent(4, 16, 8, 32, 16),
    Latent(3, 24, 16, 40, 20, interleaved=False),
    Latent(2, 5, 2, 7, 3, kind="fp16"),
    Latent(16, 32, 32, 128, 80, kind="fp16"),
    Latent(4, 32, 32, 128, 64, kind="int8", parts=5),
    Latent(3, 8, 4, 12, 70, kind="int8", parts=4),
    Latent(4, 16, 8, 32, 16, group=16),
    Latent(3, 5, 2, 256, 70, kind="fp16", group=128, zero_points=True),
    Latent(2, 24, 8, 96, 20, kind="int8", parts=13, group=32),
    Latent(3, 20, 8, 48, 33, group=16, bits=(4, 8), zero_points=True),
    Latent(2, 24, 8, 512, 20, kind="fp16", group=64, bits=(4, 4), zero_points=True),
    Latent(4, 16, 8, 32, 16, norm=True),
    Latent(2, 24, 8, 96, 20, kind="int8", parts=13, group=32, bits=(4, 8), norm=True),
    Latent(16, 16, 64, 128, 24, kind="int8", parts=3),
    Latent(19, 8, 32, 64, 16, kind="int8", parts=3, group=32, norm=True),
    Grouped(6, 2, 24, 12, norm="head"),
    Grouped(4, 2, 20, 10, kind="int8", norm="row"),
    Grouped(9, 3, 13, 4, window=9, kind="int8"),
    Grouped(16, 1, 128, 64, window=130, sinks=True, interleaved=True, kind="int8"),
    Grouped(4, 2, 40, 20, kind="int8", channels=True),
    Grouped(3, 3, 64, 32, kind="int8"),
    Grouped(12, 3, 192, 32, window=70, sinks=True, kind="int8", norm="head"),
    Grouped(5, 1, 256, 64, window=200, kind="int8"),
    Grouped(14, 2, 64, 16, interleaved=True, kind="int8", norm="row"),
    Grouped(2, 1, 320, 32, kind="int8"),
]
# Rows in the caches, rows of the run: by lane. Blocks are of 128 keys, panels of 64.
RUNS = [
    ([0], [1]),
    ([0], [70]),
    ([63], [1]),
    ([127], [1]),
    ([128], [1]),
    ([250], [133]),
    ([900], [9]),
    ([3, 0, 128, 700], [1, 0, 1, 1]),
    ([40, 5], [33, 0]),
]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)


def spread(value: np.ndarray) -> float:
    return float(np.abs(value).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_numpy_and_to_the_bit_on_every_path(
    case: Grouped | Latent, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every instruction set and number of threads; what is in the caches is what numpy puts there."""
    generator = np.random.default_rng(CASES.index(case))
    paths = [(forms[0], 1), *((form, 3) for form in forms)]
    for lengths, sizes in RUNS:
        rows = sum(sizes) + (1 if len(sizes) > 2 else 0)
        run = make_run(case, lengths, sizes, generator, capacity=max(lengths) + max(sizes), rows=rows)
        wanted = run.copy()
        y = reference(case, wanted)
        first: tuple[Any, Run] | None = None
        for (name, library), threads in paths:
            monkeypatch.setenv(kernels.VARIABLE, name)
            own = run.copy()
            found = run_model(open_case(case, own, library, threads), own)
            if first is None:
                first = found, own
                check_result(case, np.abs(found - y) / spread(y))
                check_caches(case, own, wanted)
            np.testing.assert_array_equal(found, first[0])
            for lane, same in zip(own.caches, first[1].caches, strict=True):
                for cache, other in zip(lane, same, strict=True):
                    np.testing.assert_array_equal(cache, other)


def check_result(case: Grouped | Latent, apart: np.ndarray) -> None:
    """By codes a word that lies between two integers may be rounded to the other one, in few of the heads."""
    exact = 4e-6 if case.kind != "int8" else 5e-4 if isinstance(case, Grouped) else 6e-4  # queries of 14 bits
    if isinstance(case, Grouped) or not case.group:
        assert apart.max() < exact
    else:
        assert np.quantile(apart, 0.75) < (2e-3 if case.kind == "int8" else exact) and apart.max() < 5e-3


def check_caches(case: Grouped | Latent, run: Run, wanted: Run) -> None:
    """Nothing is written but the run's rows, and those as numpy rounds them, or one step off where it lies between."""
    off = {"fp32": 1e-5, "fp16": 4e-3, "int8": 1.0}[case.kind]
    for lane, expected in zip(run.caches, wanted.caches, strict=True):
        for cache, other in zip(lane, expected, strict=True):
            np.testing.assert_array_equal(np.isnan(cache), np.isnan(other))
            apart = np.abs(np.nan_to_num(cache.astype(np.float64)) - np.nan_to_num(other.astype(np.float64)))
            assert apart.max() <= off and (apart > 0.5 * off).mean() < 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_its_bits_whoever_else_is_in_the_run(case: Grouped | Latent, library: Path) -> None:
    """A chunk's rows one by one and in parts; lanes each alone."""
    generator = np.random.default_rng(50 + CASES.index(case))
    chunk = make_run(case, [120], [75], generator)
    session = open_case(case, chunk, library, 2)
    whole = chunk.copy()
    y = run_model(session, whole)
    for step in (1, 16, 50):
        parts = chunk.copy()
        found = [run_model(session, parts.only(0, at, min(step, 75 - at))) for at in range(0, 75, step)]
        np.testing.assert_array_equal(np.concatenate(found), y)
        for cache, other in zip(parts.caches[0], whole.caches[0], strict=True):
            np.testing.assert_array_equal(cache, other)
    lanes = make_run(case, [500, 3, 0, 127, 300], [1, 1, 1, 1, 1], generator)
    together = run_model(open_case(case, lanes, library, 2), lanes)
    for lane in range(5):
        np.testing.assert_array_equal(run_model(session_of_one(case, lanes, library), lanes.only(lane, 0, 1)),
                                      together[lane : lane + 1])  # fmt: skip


def session_of_one(case: Grouped | Latent, run: Run, library: Path) -> Any:
    return open_case(case, run.only(0, 0, 1), library)


@pytest.mark.parametrize("size", [64, 80, 128])
def test_a_large_channel_of_keys_costs_little_accuracy(size: int, library: Path) -> None:
    """As real models have it: 30 times the others in every key, which scales of rows alone would make 0.06 of."""
    case, rows = Grouped(8, 2, size, size // 4, kind="int8"), 600
    generator = np.random.default_rng(size)
    run = make_run(case, [0], [rows], generator)
    errors = []
    for large in (0, 30):
        run.inputs["k"][:, [size - 5, 2 * size - 5]] += np.float32(large)  # of both heads, behind what is rotated
        found = run_model(open_case(case, run.copy(), library), run.copy())
        exact = run.copy()
        exact.caches = [[np.zeros((1, 2, rows, case.room), np.float32) for _ in range(2)]]
        wanted = reference(replace(case, kind="fp32"), exact)
        errors.append(np.abs(found - wanted).mean() / np.abs(wanted).mean())
    assert errors[0] < 0.012 and errors[1] < 0.022, errors


@pytest.mark.parametrize("size", [16, 64])  # the latter by integers
def test_what_is_no_number_or_zero_in_int8(size: int, library: Path) -> None:
    """A key or value that is no number is seen as one by those behind it alone; rows of zeros count as zeros."""
    case = Grouped(4, 2, size, 8, kind="int8")
    for name in ("k", "v"):
        for bad in (np.nan, np.inf):
            run = make_run(case, [10], [30], np.random.default_rng(12))
            session = open_case(case, run, library)
            clean = run_model(session, run.copy())
            run.inputs[name][20, 3] = bad  # of the first head of keys, which two heads of queries look at
            parts = run.copy()
            each = [run_model(session, parts.only(0, at, 1)) for at in range(30)]
            wanted = clean.reshape(30, 4, size)
            for found in (run_model(session, run.copy()), np.concatenate(each)):
                y = found.reshape(30, 4, size)
                np.testing.assert_array_equal(y[:20], wanted[:20])
                np.testing.assert_array_equal(y[:, 2:], wanted[:, 2:])
                assert np.isnan(y[20:, :2]).all()
    run = make_run(case, [0], [5], np.random.default_rng(13))
    run.inputs["v"][:] = 0
    assert (run_model(open_case(case, run, library), run) == 0).all()
    assert all(np.isfinite(cache).all() for cache in run.caches[0])


def test_one_lane_needs_no_sizes(library: Path) -> None:
    generator = np.random.default_rng(3)
    for case in (CASES[0], CASES[8]):
        run = make_run(case, [5], [4], generator)
        short = open_model(model_of(case)(case, 1, run.constants, sizes=False), library)
        np.testing.assert_array_equal(run_model(short, run.copy()), run_model(open_case(case, run, library), run))


@pytest.mark.parametrize(("bits", "step"), [(8, 20), (4, -1)])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_codes_of_heads_are_multiplied_as_integers(group: int, bits: int, step: int, library: Path) -> None:
    """Near to what their floats give; what moves codes and zero points alike changes no bit, whatever the rows."""
    for rows in (1, 3, 9, 130):
        case = Latent(3, 20, 8, 128, 83, group=group, bits=(bits, bits))
        run = make_run(case, [70], [rows], np.random.default_rng(rows))
        y = run_model(open_case(case, run.copy(), library), run.copy())
        moved = run.copy()
        moved.constants = dict(run.constants)
        for name in ("k", "v"):
            codes, points = unpack_rows(case, run.constants, name)
            for part, values in (("up", codes.astype(int)), ("zeros", points)):
                shifted = (values + step).astype(np.uint8)
                moved.constants[f"{name}_{part}"] = pack_rows(shifted) if bits == 4 else shifted
        np.testing.assert_array_equal(run_model(open_case(case, moved, library), moved), y)
        floats = run.copy()
        floats.constants = dict.fromkeys(run.constants) | {
            f"{name}_up": dequantized(case, run.constants, name) for name in ("k", "v")
        }
        expected = run_model(open_case(case, floats, library), floats)
        assert 1e-5 < spread(y - expected) / spread(expected) < 0.02


@pytest.mark.parametrize("seed", range(12))
def test_codes_of_heads_in_any_shape(seed: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, groups, heads' sizes, bits and numbers of rows by chance, on every instruction set."""
    generator = np.random.default_rng(seed)
    group = int(generator.choice([16, 32, 64, 128]))
    rank = group * int(generator.integers(1, 512 // group + 1))
    nope, value = (int(size) for size in generator.integers(8, 193, 2))
    bits = [(4, 8), (4, 4), (8, 4)][seed % 3]
    case = Latent(2, nope, 8, rank, value, group=group, bits=bits, zero_points=seed % 2 == 1)
    run = make_run(case, [int(generator.integers(20))], [int(generator.integers(1, 131))], generator)
    y = reference(case, run.copy())
    first = None
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        found = run_model(open_case(case, run.copy(), library, 2), run.copy())
        check_result(case, np.abs(found - y) / spread(y))
        np.testing.assert_array_equal(found, found if first is None else first)
        first = found


def test_codes_without_what_belongs_to_them_are_refused(library: Path) -> None:
    case = Latent(4, 16, 8, 32, 16, group=16, zero_points=True)
    spoils: list[tuple[str, Any]] = [
        ("k_scales", lambda a: None),
        ("v_scales", lambda a: a[..., :1]),
        ("k_scales", lambda a: np.repeat(a, 2, axis=-1)),
        ("v_zeros", lambda a: a[:, :-1]),
        ("v_up", lambda a: a.astype(np.float32)),
    ]
    for name, spoil in spoils:
        run = make_run(case, [6], [1], np.random.default_rng(8))
        run.constants[name] = spoil(run.constants[name])
        with pytest.raises(Exception, match=FIT):
            run_model(open_case(case, run, library), run)


def test_what_is_no_number_stays_with_those_who_see_it(library: Path) -> None:
    generator = np.random.default_rng(4)
    for case in (CASES[0], CASES[8]):
        run = make_run(case, [10], [3], generator)
        session = open_case(case, run, library)
        clean = run_model(session, run.copy())
        run.inputs["q"][1, 0] = np.nan
        y = run_model(session, run.copy())
        assert np.isnan(y[1]).any() and not np.isnan(y[[0, 2]]).any()
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


def test_what_is_no_number_in_a_cache_of_integers(library: Path) -> None:
    """A token whose latent is none is seen by itself and by those behind it, in a step of its own or with others."""
    case = Latent(3, 16, 32, 64, 16, kind="int8", parts=3)
    run = make_run(case, [10], [4], np.random.default_rng(9))
    session = open_case(case, run, library)
    clean = run_model(session, run.copy())
    for value in (np.nan, np.inf):
        run.inputs["latent"] = run.inputs["latent"].copy()
        run.inputs["latent"][2, 5] = value
        y = run_model(session, run.copy())
        assert np.isnan(y[2:]).all()
        np.testing.assert_array_equal(y[:2], clean[:2])
    run.inputs["latent"][:] = 0.0  # the blocks' scales are the least ones
    assert np.isfinite(run_model(session, run.copy())).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_in_a_window(value: float, library: Path) -> None:
    """Who sees it gets none, and who does not is as before; in a step of its own or with others."""
    case = Grouped(2, 1, 64, 8, window=5, kind="int8")
    run = make_run(case, [130], [40], np.random.default_rng(14))
    session = open_case(case, run, library)
    clean = run_model(session, run.copy())
    run.inputs["v"][20, 7] = value
    parts = run.copy()
    each = [run_model(session, parts.only(0, at, 1)) for at in range(40)]
    for y in (run_model(session, run.copy()), np.concatenate(each)):
        assert np.isnan(y[20:25]).all()
        others = np.r_[0:20, 25:40]
        np.testing.assert_array_equal(y[others], clean[others])


def test_shares_of_hardly_anything_are_nothing(
    forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the likeliest keys' values are zeros, what is left may be too small for a scale of its own."""
    case = Grouped(4, 2, 64, 8, kind="int8")
    run = make_run(case, [250], [12], np.random.default_rng(15))
    run.inputs["q"] *= np.float32(400)
    run.caches[0][3][0, :, :250:2] = 0.0
    wanted = None
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        session, parts = open_case(case, run, library), run.copy()
        each = [run_model(session, parts.only(0, at, 1)) for at in range(12)]
        for y in (run_model(session, run.copy()), np.concatenate(each)):
            wanted = y if wanted is None else wanted
            np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("size", [64, 128, 192])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 100.0])
def test_heads_of_integers_are_nearer_to_the_cache_than_the_cache_to_what_it_holds(
    size: int, sharpness: float, library: Path
) -> None:
    for seed in range(3):
        case = Grouped(4, 2, size, 16, kind="int8")
        run = make_run(case, [0], [200], np.random.default_rng(seed))
        run.inputs["q"] *= np.float32(sharpness)
        exact = run.copy()
        exact.caches = [[np.zeros((1, 2, 200, size), np.float32) for _ in range(2)]]
        wanted = reference(replace(case, kind="fp32"), exact)
        held = reference(case, run.copy())
        found = run_model(open_case(case, run, library), run)
        assert np.square(found - held).mean() ** 0.5 < 0.1 * np.square(held - wanted).mean() ** 0.5


@pytest.mark.parametrize(("rank", "rope"), [(128, 64), (128, 32), (512, 64)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 100.0])
def test_integers_are_nearer_to_the_cache_than_the_cache_to_what_it_holds(
    rank: int, rope: int, sharpness: float, library: Path
) -> None:
    """From shares that are nearly alike to a single one: the error of integers beside that of rounding the cache."""
    block = int(np.gcd(rank, rope))
    for seed in range(3):
        case = Latent(4, 32, rope, rank, 32, kind="int8", parts=(rank + rope) // block)
        run = make_run(case, [0], [200], np.random.default_rng(seed))
        run.inputs["q"] *= np.float32(sharpness / rank**0.5)
        exact = Run(run.inputs, [0], [200], [[np.zeros((200, rank + rope), np.float32)]], run.constants)
        wanted = reference(Latent(4, 32, rope, rank, 32), exact)
        held = reference(case, run.copy())
        found = run_model(open_case(case, run, library), run)
        assert np.square(found - held).mean() ** 0.5 < 0.1 * np.square(held - wanted).mean() ** 0.5


def change(name: str, array: Any) -> Any:
    return lambda run: run.inputs.update({name: array(run.inputs[name])})


def shrink(run: Run) -> None:
    run.caches[0] = [np.ascontiguousarray(cache[..., :-1, :]) for cache in run.caches[0]]


def narrow(run: Run) -> None:
    run.caches[1] = [np.ascontiguousarray(cache[..., :-1]) for cache in run.caches[1]]


FIT, CACHE = "the inputs' shapes do not fit each other", "a KV cache is of another shape or type"
WRONG: list[tuple[Any, str]] = [
    (lambda run: run.lengths.__setitem__(0, -1), "2 rows after -1 do not fit a KV cache of 8, or the run of 3"),
    (lambda run: run.lengths.__setitem__(0, 7), "2 rows after 7 do not fit a KV cache of 8"),
    (lambda run: run.lengths.__setitem__(1, 2**62), f"1 rows after {2**62} do not fit a KV cache of 7"),
    (lambda run: run.sizes.__setitem__(1, 2), "2 rows after 6 do not fit a KV cache of 7, or the run of 3"),
    (lambda run: run.sizes.__setitem__(1, -1), "-1 rows after 6 do not fit"),
    (shrink, "2 rows after 6 do not fit a KV cache of 7"),
    (lambda run: run.sizes.append(0), "lengths, sizes and KV caches are not of as many lanes"),
    (lambda run: (run.sizes.pop(), run.lengths.pop()), "lengths, sizes and KV caches are not of as many lanes"),
    (change("q", lambda a: a[:, :-1]), FIT),
    (change("cos", lambda a: a[:, :2]), FIT),
    (change("sin", lambda a: a[0]), FIT),
]


@pytest.mark.parametrize("case", [Grouped(4, 2, 16, 8), Latent(4, 16, 8, 32, 16)], ids=["grouped", "latent"])
@pytest.mark.parametrize(("spoil", "text"), WRONG)
def test_inputs_that_do_not_fit_are_refused(case: Grouped | Latent, spoil: Any, text: str, library: Path) -> None:
    run = make_run(case, [6, 6], [2, 1], np.random.default_rng(5))
    session = open_case(case, run, library)
    spoil(run)
    with pytest.raises(Exception, match=text):
        run_model(session, run)


STACKED = [
    Grouped(4, 2, 16, 8),
    Grouped(4, 2, 64, 32, kind="int8"),
    Latent(4, 16, 8, 32, 16, kind="fp16"),
    Latent(4, 16, 8, 32, 16, kind="int8", parts=5),
]


@pytest.mark.parametrize("case", STACKED)
def test_a_cache_may_be_one_of_several_layers(case: Grouped | Latent, library: Path) -> None:
    run = make_run(case, [6, 3], [2, 1], np.random.default_rng(23))
    stacked = run.copy()
    others = [[np.flip(cache).copy() for cache in lane] for lane in run.caches]
    expected = run_model(open_case(case, run, library), run)
    model = onnx.load_from_string(model_of(case)(case, 2, run.constants))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("layer", 1))
    session = open_model(model.SerializeToString(), library, 1)
    for lane, rest in zip(stacked.caches, others, strict=True):
        lane[:] = [np.stack([other, cache, other]) for cache, other in zip(lane, rest, strict=True)]
    np.testing.assert_array_equal(run_model(session, stacked), expected)
    for lane, alone, rest in zip(stacked.caches, run.caches, others, strict=True):
        for stack, cache, other in zip(lane, alone, rest, strict=True):
            assert stack.tobytes() == other.tobytes() + cache.tobytes() + other.tobytes()
    stacked.caches = [[np.ascontiguousarray(stack[:1]) for stack in lane] for lane in stacked.caches]
    with pytest.raises(Exception, match="a KV cache has no such layer"):
        run_model(session, stacked)


def test_caches_of_another_kind_are_refused(library: Path) -> None:
    generator = np.random.default_rng(6)
    for case, change_cache in ((CASES[0], narrow), (CASES[8], narrow)):
        run = make_run(case, [6, 6], [2, 1], generator)
        session = open_case(case, run, library)
        change_cache(run)
        with pytest.raises(Exception, match=CACHE):
            run_model(session, run)
    channels = Grouped(4, 2, 16, 8, kind="int8", channels=True)
    run = make_run(channels, [6], [1], generator)
    run.constants["key_scales"] = None
    with pytest.raises(Exception, match=FIT):
        run_model(open_case(channels, run, library), run)
    for index, text in ((2, CACHE), (3, CACHE)):
        grouped = Grouped(4, 2, 16, 8, kind="int8")
        run = make_run(grouped, [6], [1], generator)
        run.caches[0][index] = np.ascontiguousarray(run.caches[0][index][:, :, :-1])
        with pytest.raises(Exception, match=text):
            run_model(open_case(grouped, run, library), run)
    grouped = Grouped(4, 2, 16, 8, kind="int8")
    run = make_run(grouped, [6, 6], [0, 1], generator)  # the lane that has rows is of another type than the one without
    run.caches[1][:2] = [cache.astype(np.float32) for cache in run.caches[1][:2]]
    model = onnx.load_from_string(grouped_model(grouped, 2, run.constants))
    for value in model.graph.input:
        if value.name in ("keys.1", "values.1"):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(Exception, match=CACHE):
        run_model(open_model(model.SerializeToString(), library, 1), run)
    latent = Latent(4, 16, 8, 32, 16, kind="int8", parts=5)
    run = make_run(latent, [6], [1], generator)
    run.caches[0][1] = np.ascontiguousarray(run.caches[0][1][:, :3])
    with pytest.raises(Exception, match="the scales of a row are not of blocks of one size"):
        run_model(open_case(latent, run, library), run)
    for normed, name in ((Grouped(4, 2, 16, 8, norm="head"), "k_norm"), (Latent(4, 16, 8, 32, 16, norm=True), "norm")):
        run = make_run(normed, [6], [1], generator)
        weight = run.constants[name]
        assert weight is not None
        run.constants[name] = weight[:-1]
        with pytest.raises(Exception, match=FIT):
            run_model(open_case(normed, run, library), run)
    with pytest.raises(Exception, match="num_heads must be a multiple of num_key_value_heads"):
        open_case(Grouped(3, 2, 16, 8), make_run(Grouped(4, 2, 16, 8), [1], [1], generator), library)

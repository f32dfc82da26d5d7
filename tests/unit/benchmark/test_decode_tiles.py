"""The search for tiles on made-up times, and its steps in Triton's interpreter."""

import dataclasses
import random
import time

import pytest

from nanochat.benchmark import decode_tiles
from nanochat.benchmark.decode_tiles import KERNELS, PRODUCTS, SIZES, Search, TimedStep, changes, fits
from nanochat.benchmark.models import random_model
from nanochat.command_settings import BenchmarkSettings
from nanochat.config import Benchmark, Model
from nanochat.infer.fused_step import Plan, Tile, plan_for

SETTINGS = BenchmarkSettings(
    seed=1,
    model=Model(depth=2, width=64, heads=4),
    vocab_size=97,
    sequence_length=64,
    dtype="float32",
    compile="off",
    benchmark=Benchmark(),
)


class LawfulStep:
    """Times that a law gives: each size of each tile has a best value, each ladder's step away from it costs 10%."""

    def __init__(self, rows: int, best: Plan):
        self.rows, self.best, self.model, self.failing = rows, best, random_model(SETTINGS), 0

    def compile(self, plans: list[Plan]) -> None:
        pass

    def times(self, plan: Plan, repeats: int = 3) -> list[float]:
        far = sum(
            abs(
                ladder.index(getattr(getattr(plan, name), size)) - ladder.index(getattr(getattr(self.best, name), size))
            )
            for name in PRODUCTS
            for size, ladder in SIZES.items()
        )
        if any(getattr(plan, name).warps == 8 for name in PRODUCTS):  # does not run
            self.failing += 1
            raise ValueError("out of resources")
        return [1.1**far]


def search_of(step: LawfulStep, plan: Plan, seconds: float) -> Search:
    return Search(step, plan, step.times(plan)[0], time.monotonic() + seconds)


def test_the_search_ends_at_the_best_plan():
    best = Plan(*(Tile(32, 32, 64, stages=3, warps=2) for _ in PRODUCTS), 64, 4, 0)
    first = Plan(*(Tile(16, 16, 64, stages=2, warps=4) for _ in PRODUCTS), 64, 4, 0)
    step = LawfulStep(32, best)
    search = search_of(step, first, 60)
    improved = [found for name in PRODUCTS * 2 for found in search.improve(name)]
    assert search.plan == best
    assert search.failed == {"ValueError": step.failing}
    assert step.failing > 0
    times = [took for _, took in improved]
    assert times == sorted(times, reverse=True)
    assert improved[-1] == (best, 1.0)


def test_a_search_without_time_changes_nothing():
    step = LawfulStep(32, plan_for(32))
    first = Plan(*(Tile(16, 16, 64, stages=2) for _ in PRODUCTS), 64, 4, 0)
    search = search_of(step, first, -1)
    assert not list(search.improve("up"))
    assert (search.plan, search.tried) == (first, 0)


@pytest.mark.parametrize("rows", [1, 3, 16, 93])
@pytest.mark.parametrize("name", PRODUCTS)
def test_changes_are_others_that_can_run(rows, name):
    step = LawfulStep(rows, plan_for(rows))
    plan, inner = plan_for(rows), 256 if name == "down" else 64
    found = changes(plan, name, step)
    assert len(found) == len(set(found)) > 4
    for other in found:
        tile = getattr(other, name)
        assert tile != getattr(plan, name).fitted(inner)
        assert dataclasses.replace(other, **{name: getattr(plan, name)}) == plan
        assert inner % (tile.splits * tile.k) == 0
        assert tile.m >= 16 or (tile.stages, tile.lanes) == (0, 1)
        assert fits(tile, inner, rows, adds=name in ("out", "down"))


@pytest.mark.parametrize("rows", [1, 32, 93])
def test_what_is_fetched_ahead_is_tried_in_all_combinations(rows):
    """And nothing else changes."""
    plan = plan_for(rows)
    found = changes(plan, "ahead", LawfulStep(rows, plan))
    assert len(found) == len(set(found))
    fetched = {(other.ahead_megabytes, other.ahead_products) for other in (*found, plan)}
    assert {(0, 1), (16, 1), (16, 2), (32, 3)} <= fetched
    unchanged = {name: getattr(plan, name) for name in ("ahead_megabytes", "ahead_products")}
    assert {dataclasses.replace(other, **unchanged) for other in found} == {plan}
    assert plan not in found


@pytest.mark.parametrize("rows", [1, 4, 8, 32, 93])
def test_plans_of_other_numbers_of_rows_are_tried_whole(rows):
    """Each other one, as high as the rows at hand, if all of its tiles can run."""
    plan, step = plan_for(rows), LawfulStep(rows, plan_for(rows))
    found = changes(plan, "whole", step)
    assert plan not in found
    heights = {other.up.m for other in found}
    assert (min(heights) == rows) == (rows in (1, 4, 8))  # without tensor cores too, where rows are few
    assert max(heights) == {1: 16, 4: 16, 8: 16, 32: 32, 93: 64}[rows]
    assert len({other.attention_warps for other in found}) > 1
    for other in found:
        for name in PRODUCTS:
            assert fits(getattr(other, name), 256 if name == "down" else 64, rows, adds=name in ("out", "down"))


def test_the_head_is_never_cut_finer_than_its_results_have_room():
    plan = plan_for(1)
    assert {other.head.n for other in changes(plan, "head", LawfulStep(1, plan))} >= {16, 32}
    with pytest.raises(ValueError, match="head: a program has 8 columns; at least 16"):
        dataclasses.replace(plan, head=Tile(1, 8, 256))


def test_tiles_that_no_device_holds_are_left_out():
    assert fits(Tile(64, 64, 64, stages=3), 3072, 93, adds=True)
    assert not fits(Tile(128, 256, 256, stages=6), 3072, 93, adds=True)  # shared memory
    assert not fits(Tile(128, 256, 32, stages=2, warps=1), 3072, 93, adds=True)  # registers of the sums
    assert not fits(Tile(16, 128, 32, stages=0, warps=1), 3072, 93, adds=True)  # of the weights
    assert not fits(Tile(64, 64, 64, splits=2, stages=3), 3072, 93, adds=False)
    assert not fits(Tile(64, 64, 64, stages=3), 3072, 30, adds=True)  # half of it would be padding


@pytest.fixture(scope="module")
def step():
    """Of one layer, two steps in a timing: the interpreter is slow."""
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.unit.infer.kernels_here import FAILS, ON_GPU

    if FAILS or ON_GPU:
        pytest.skip(FAILS or "float32 is for the interpreter")
    small = SETTINGS.model_copy(update={"model": Model(depth=1, width=64, heads=4), "vocab_size": 33})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_tiles, "STEPS_IN_A_ROW", 2)
        made = TimedStep(random_model(small), rows=3, filled=12, replays=1)
        assert made.first == 11
        yield made


def test_plans_that_the_search_proposes_compute_the_same(step):
    plan, chance = plan_for(3), random.Random(7)
    step.check(plan)
    for name in (*PRODUCTS, "attend"):
        for other in chance.sample(changes(plan, name, step), 2 if name in ("down", "attend") else 1):
            step.check(other)


def test_a_plan_that_computes_something_else_is_refused(step, monkeypatch):
    plan = plan_for(3)
    step.check(plan)
    monkeypatch.setattr(step.step, "without", "up")
    with pytest.raises(ValueError, match="computes something else"):
        step.check(plan)


@pytest.mark.parametrize("name", KERNELS)
def test_leaving_a_kernel_out_saves_it_alone(step, name, monkeypatch):
    """Counted by the kernels' launches: as many fewer as the step has of that one."""
    launches = []
    for module in (step.step.kernels, step.step.attention, step.step.products):
        for kernel in ("embed", "attend", "finish", "matmul"):
            if (found := getattr(module, kernel, None)) is not None and hasattr(found, "run"):
                monkeypatch.setattr(module, kernel, _Counted(found, launches))
    counts = []
    for without in (None, name):
        step.step.without = without
        step._begin()
        launches.clear()
        step._steps(plan_for(3), 1)
        counts.append(len(launches))
    assert counts[0] - counts[1] == 1


class _Counted:
    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return self.kernel[grid]


def test_times_are_those_of_a_step_and_start_anew(step):
    times = step.times(plan_for(3), repeats=1)
    assert len(times) == 1
    assert 0 < times[0] < 60
    assert int(step.state.position[0]) == step.first + 2
    assert (step.state.drawn >= 0).all()
    again = step.state.drawn.clone()
    step.times(plan_for(3), repeats=1)
    assert (step.state.drawn == again).all()

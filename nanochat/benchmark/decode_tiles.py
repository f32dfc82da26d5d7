"""What each kernel of a decode step costs, and which tiles make the step fastest: where the plans of `infer.fused_step` come from.

At each batch size the step is captured and replayed as decoding does it, and timed

plan           with the tiles of `plan_for`
without_X      with one kernel left out (of each layer): what the step saves is X's share of it. Since kernels overlap these shares
               may add up to less than the step
without_ahead  nothing fetched ahead for the attention to come; more than the step, if that is worth something
improved       with one change of the plan that made it faster, as the search goes on
tuned          with the best plan found, timed in turns with the first one

The search tries the whole plans of other numbers of rows, then changes one tile at a time, one or two of its sizes at a time or all
to those of another number of rows, keeps what is faster by more than the noise, and ends where no such change is left, or when its
time is used up. A plan whose kernels compute something else is not taken. Plans that do not run, too large for the device for one,
are counted in `failed`, by what they raised.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, product

import torch

from nanochat.benchmark.roofline import Rates, cached_step
from nanochat.benchmark.timing import seconds_of, spread
from nanochat.infer import fused_step
from nanochat.infer.decode import Rows
from nanochat.infer.decoder import STEPS_IN_A_ROW, captured
from nanochat.infer.fused_step import FEWEST_HEAD_COLUMNS, FusedStep, Plan, Tile, plan_for, power_of_two
from nanochat.infer.sampling import Kind
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT
from nanochat.progress import say

PRODUCTS = (*fused_step.PRODUCTS, "head")
ADDED = ("out", "down")  # to the stream, so that parts of K can be too
KERNELS = (*PRODUCTS, "attend", "finish")
GREEDY = Kind(greedy=True, cut=False, filtered=False)
SEARCH_SECONDS = 240.0  # at a batch size
REPLAYS = 12  # of STEPS_IN_A_ROW steps, in one timing
GAIN = 0.004  # of the step's time: less is noise
LARGEST_ERROR = 0.02  # of the stream, relative, between two plans in bfloat16
COMPILERS = 14  # threads
# Of the plans whose tiles are tried too: what they differ in may be too much for single changes to find.
OTHER_ROWS = (1, 16, 32, 64, 93)

SIZES: dict[str, tuple[int, ...]] = {
    "m": (1, 2, 4, 8, 16, 32, 64, 128),
    "n": (4, 8, 16, 32, 64, 128, 256),
    "k": (32, 64, 128, 256, 512, 1024),
    "splits": (1, 2, 3, 4, 6, 8),
    "stages": (0, 2, 3, 4, 5, 6),
    "warps": (1, 2, 4, 8),
    "lanes": (1, 2, 4, 8),
}
ATTENTION_SIZES: dict[str, tuple[int, ...]] = {
    "positions": (8, 16, 32, 64, 128, 256),
    "attention_warps": (1, 2, 4, 8),
    "attention_held": (0, 1, 2, 3, 4, 6, 8),
    "attention_stages": (1, 2, 3, 4),
    "attention_registers": (0, 112, 96, 128, 80, 64),  # those most likely to help next to no limit
}
# Of keys and values the L2 cache is asked for so many megabytes, by the product so many before attention.
MEGABYTES_AHEAD, PRODUCTS_AHEAD = (8, 16, 24, 32), (1, 2, 3)
# Sizes that are often better changed together: one gives the room that the other needs.
PAIRS = {
    frozenset(pair)
    for pair in (
        ("n", "warps"),
        ("k", "stages"),
        ("m", "n"),
        ("k", "lanes"),
        ("n", "splits"),
        ("positions", "attention_warps"),
        ("positions", "attention_held"),
        ("attention_warps", "attention_held"),
        ("attention_held", "attention_registers"),
    )
}

REGISTERS = 255  # of 4 bytes, of a thread
SHARED_BYTES = 227 * 1024  # of a program, on an H100


def measure(model: GPT, batch_sizes: list[int], filled: int, rates: Rates, seconds: float) -> Iterator[dict]:
    """The rows of decode_tiles.json.

    filled   positions of each row, in the middle of what is timed
    seconds  of the search at each batch size
    """
    for size in batch_sizes:
        yield from _measure_size(TimedStep(model, size, filled), rates, seconds)


def _measure_size(step: "TimedStep", rates: Rates, seconds: float) -> Iterator[dict]:
    rows, first = step.rows, plan_for(step.rows, _head_dim(step))
    floor = cached_step(step.model, rows, step.filled).bytes / rates.copy_bytes_per_second

    def row(case: str, times: list[float], **more) -> dict:
        took = statistics.median(times)
        return {
            "case": case,
            "batch_size": rows,
            "microseconds": 1e6 * took,
            "spread": spread(times),
            "tokens_per_second": rows / took,
            "floor_fraction": floor / took,
        } | more

    before = step.times(first)
    yield row("plan", before, plan=repr(first))
    costs: dict[str, float] = {}
    for name in KERNELS:
        times = step.times(first, without=name)
        costs[name] = statistics.median(before) - statistics.median(times)
        yield row(f"without_{name}", times, saved_microseconds=1e6 * costs[name])
    times = step.times(replace(first, ahead_megabytes=0))
    yield row("without_ahead", times, saved_microseconds=1e6 * (statistics.median(before) - statistics.median(times)))
    plan = first
    search = Search(step, first, statistics.median(before), time.monotonic() + seconds)
    tiles = sorted((*PRODUCTS, "attend"), key=costs.__getitem__, reverse=True)
    for name in ("whole", *("ahead", *tiles) * 2):
        for plan, took in search.improve(name):
            yield row("improved", [took], kernel=name, plan=repr(plan))
    turns = [(step.times(first), step.times(plan)) for _ in range(3)]
    again, after = ([took for times in side for took in times] for side in zip(*turns, strict=True))
    yield row(
        "tuned",
        after,
        plan=repr(plan),
        first_microseconds=1e6 * statistics.median(again),
        tried=search.tried,
        failed=dict(search.failed),
    )
    say(
        "benchmark decode_tiles",
        f"{rows} rows: {1e6 * statistics.median(again):.1f} to {1e6 * statistics.median(after):.1f} us a step "
        f"({floor / statistics.median(after):.0%} of the floor), {search.tried} plans tried: {plan}",
    )


class PartialStep(FusedStep):
    """A decode step that can leave out one kind of its kernels: then it draws nonsense, in less time."""

    without: str | None = None

    def _attend(self, *arguments) -> None:
        if self.without != "attend":
            super()._attend(*arguments)

    def _finish(self, *arguments) -> None:
        if self.without != "finish":
            super()._finish(*arguments)

    def _matmul(self, rows: int, plan: Plan, product: int, *arguments) -> None:
        if self.without != self._named(product):
            super()._matmul(rows, plan, product, *arguments)


class TimedStep:
    """A decode step of `rows` rows on a cache of random keys and values, and how long it takes."""

    def __init__(self, model: GPT, rows: int, filled: int, replays: int = REPLAYS):
        """filled: positions of each row halfway through a timing; as many steps are run as decode around it."""
        self.model, self.rows, self.filled, self.replays = model, rows, filled, replays
        steps = replays * STEPS_IN_A_ROW
        self.first = max(0, filled - steps // 2)
        device = model.device
        self.cache = KVCache(model.config, rows, self.first + steps + 1, device, model.compute_dtype)
        generator = torch.Generator(device).manual_seed(rows)
        for side in (*self.cache.keys, *self.cache.values):
            side.normal_(generator=generator)
        self.state = Rows.empty(rows, steps, device)
        self.tokens = torch.randint(model.config.vocab_size, (rows,), generator=generator, device=device)
        self.step = PartialStep(model, self.cache, self.state)
        self.splits = self.step.splits(rows, self.first + steps)
        self.expected: tuple[torch.Tensor, torch.Tensor] | None = None

    def times(self, plan: Plan, without: str | None = None, repeats: int = 3) -> list[float]:
        """Seconds of a step, of each repeat; raises what the compiler, the launch or `check` does."""
        self.step.without = without
        if without is None:
            self.check(plan)
        self._begin()
        if self.model.device.type == "cuda":
            graph, _ = captured(lambda: self._steps(plan, STEPS_IN_A_ROW), None)
            replay: Callable[[], object] = graph.replay
        else:
            replay = lambda: self._steps(plan, STEPS_IN_A_ROW)  # noqa: E731
        seconds = []
        for repeated in range(repeats + 1):
            self._begin()
            took = seconds_of(lambda: [replay() for _ in range(self.replays)], self.model.device)
            if repeated:  # the first warms up
                seconds.append(took / self.replays / STEPS_IN_A_ROW)
        return seconds

    def check(self, plan: Plan) -> None:
        """ValueError when the plan's step computes something else than that of the first plan checked."""
        self._begin()
        for buffer in (self.step.x, self.step.qkv, self.step.attended, self.step.hidden, self.step.best):
            buffer.fill_(3.0)  # what is not computed must not be what the step before has left
        self._steps(plan, 1)
        found = self.step.x[: self.rows].float().clone(), self.state.drawn[:, 0].clone()
        if self.expected is None:
            self.expected = found
        error = (found[0] - self.expected[0]).norm() / self.expected[0].norm()
        # In bfloat16 a near tie can go either way; more of them than a quarter are none.
        if not error < LARGEST_ERROR or (found[1] != self.expected[1]).sum() > (self.rows + 3) // 4:
            raise ValueError(f"computes something else: the stream differs by {error:.3g}")

    def compile(self, plans: list[Plan]) -> None:
        """Compile the kernels of all these plans side by side. What does not compile fails again when it is launched."""
        if self.model.device.type != "cuda":
            return
        from triton.runtime._async_compile import AsyncCompileMode

        step = self.step
        modules = {name: getattr(step, name) for name in ("kernels", "attention", "products")}
        step.without = None
        try:
            vars(step).update({name: _Compiling(module) for name, module in modules.items()})
            with ThreadPoolExecutor(COMPILERS) as pool, AsyncCompileMode(pool, ignore_errors=True):
                for plan in plans:
                    self._steps(plan, 1)
        finally:
            vars(step).update(modules)

    @torch.no_grad()
    def _steps(self, plan: Plan, count: int) -> None:
        self.step(self.rows, self.splits, GREEDY, count, plan)

    def _begin(self) -> None:
        state = self.state
        state.token.copy_(self.tokens)
        # Without `finish` no row moves on: it stands where it does on average.
        state.position.fill_(self.filled if self.step.without == "finish" else self.first)
        state.remaining.fill_(2**30)
        state.running.fill_(True)
        state.stops.fill_(-1)
        state.column.zero_()


class _Compiling:
    """A module of Triton kernels whose launches compile and do nothing else."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name: str):
        found = getattr(self.module, name)
        if not hasattr(found, "warmup"):
            return found
        return _Warmup(found)


class _Warmup:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)


class Search:
    """Coordinate descent from a plan, on the time of `step`."""

    def __init__(self, step: TimedStep, plan: Plan, seconds: float, deadline: float):
        """seconds: of the plan's step; deadline: of time.monotonic()."""
        self.step, self.plan, self.seconds, self.deadline = step, plan, seconds, deadline
        self.tried, self.failed = 0, Counter[str]()
        self.known: set[Plan] = {plan}

    def improve(self, name: str) -> Iterator[tuple[Plan, float]]:
        """Change the tile `name` as long as that gives something; each better plan with its seconds."""
        while time.monotonic() < self.deadline:
            plans = [plan for plan in changes(self.plan, name, self.step) if plan not in self.known]
            self.known.update(plans)
            self.step.compile(plans)
            best: tuple[float, Plan] | None = None
            for plan in plans:
                if time.monotonic() > self.deadline:
                    break
                self.tried += 1
                try:
                    took = self.step.times(plan, repeats=1)[0]
                except torch.AcceleratorError:
                    raise  # after it nothing runs on this device any more
                except Exception as error:  # of the compiler, of the launch, of `check`: each has its own
                    self.failed[type(error).__name__] += 1
                    continue
                if best is None or took < best[0]:
                    best = took, plan
            if best is None or best[0] > (1 - GAIN) * self.seconds:
                return
            # The fastest of many is the luckiest too: it must be so again.
            again = statistics.median(self.step.times(best[1]))
            if again > (1 - GAIN) * self.seconds:
                return
            self.seconds, self.plan = again, best[1]
            yield self.plan, self.seconds


def changes(plan: Plan, name: str, step: TimedStep) -> list[Plan]:
    """Plans that differ from this one in one size of the tile `name`, or in two that go together, by a step or two.

    "whole": in everything, the plans of other numbers of rows. "ahead": in what the L2 cache is asked for, all combinations.
    """
    if name == "whole":
        return _others(plan, step)
    if name == "ahead":
        asked = ((0, 1), *product(MEGABYTES_AHEAD, PRODUCTS_AHEAD))
        others = (replace(plan, ahead_megabytes=megabytes, ahead_products=products) for megabytes, products in asked)
        return [other for other in others if other != plan]
    if name == "attend":
        others = [replace(plan, **changed) for changed in _neighbours(vars(plan), ATTENTION_SIZES, PAIRS)]
        return [other for other in others if holds(other, _head_dim(step))]
    inner = _inner(name, step)
    neighbours = [
        replace(getattr(plan, name), **changed) for changed in _neighbours(vars(getattr(plan, name)), SIZES, PAIRS)
    ]
    elsewhere = [_widened(getattr(plan_for(rows, _head_dim(step)), name), step.rows) for rows in OTHER_ROWS]
    tiles = dict.fromkeys(
        tile
        for tile in (_mended(tile).fitted(inner) for tile in (*neighbours, *elsewhere))
        if fits(tile, inner, step.rows, adds=name in ADDED) and (name != "head" or tile.n >= FEWEST_HEAD_COLUMNS)
    )
    return [replace(plan, **{name: tile}) for tile in tiles if tile != getattr(plan, name).fitted(inner)]


def _others(plan: Plan, step: TimedStep) -> list[Plan]:
    """The plans of OTHER_ROWS, with tiles as high as this step's rows ask for; those of which all tiles fit."""
    found = []
    for rows in OTHER_ROWS:
        other = plan_for(rows, _head_dim(step))
        tiles = {name: _widened(getattr(other, name), step.rows).fitted(_inner(name, step)) for name in PRODUCTS}
        if all(fits(tile, _inner(name, step), step.rows, name in ADDED) for name, tile in tiles.items()):
            found.append(replace(other, **tiles))
    return [other for other in dict.fromkeys(found) if other != plan]


def _widened(tile: Tile, rows: int) -> Tile:
    """The tile as high as rows in all, if it is for few rows; no higher than them, if it is for more."""
    return replace(tile, m=power_of_two(rows) if tile.m < 16 else min(tile.m, max(16, power_of_two(rows))))


def _inner(name: str, step: TimedStep) -> int:
    """K of a product."""
    return step.model.config.width * (4 if name == "down" else 1)


def _head_dim(step: TimedStep) -> int:
    config = step.model.config
    return config.width // config.heads


def holds(plan: Plan, head_dim: int) -> bool:
    """Whether the registers hold what attention fetches before it waits."""
    return plan.positions * min(64, head_dim) * plan.attention_held <= 160 * 32 * plan.attention_warps


def _neighbours(sizes: dict, ladders: dict[str, tuple[int, ...]], pairs: Iterable[frozenset[str]]) -> Iterator[dict]:
    def reached(key: str, far: int) -> list[int]:
        ladder = ladders[key]
        at = min(range(len(ladder)), key=lambda i: abs(ladder[i] - sizes[key]))
        return [ladder[i] for i in range(max(0, at - far), min(len(ladder), at + far + 1)) if ladder[i] != sizes[key]]

    for key in ladders:
        yield from ({key: value} for value in reached(key, 2))
    for one, other in combinations(ladders, 2):
        if frozenset((one, other)) in pairs:
            yield from ({one: a, other: b} for a, b in product(reached(one, 1), reached(other, 1)))


def _mended(tile: Tile) -> Tile:
    """Without tensor cores there are no stages and no lanes."""
    return replace(tile, stages=0, lanes=1) if tile.m < 16 else tile


def fits(tile: Tile, inner: int, rows: int, adds: bool) -> bool:
    """Whether a tile of a product can be expected to run, and not to be a waste.

    adds: the product is added to the stream, so that parts of K can be
    """
    if tile.splits > 1 and not adds:
        return False
    most = max(power_of_two(rows), 16 if tile.m >= 16 else 1)
    if tile.m > most or (tile.m < 16 and rows > 8) or (tile.m >= 16 and tile.n < 8):
        return False
    threads, part = 32 * tile.warps, inner // tile.splits
    if tile.m < 16:
        return tile.n * (part + tile.k) <= 200 * threads  # float32 weights, held, and the products
    accumulator = tile.lanes * tile.m * tile.n
    if tile.stages == 0:
        return accumulator + tile.n * part // 2 <= 200 * threads  # two half-precision weights a register
    return accumulator <= REGISTERS * threads and tile.stages * (tile.m + tile.n) * tile.k * 2 <= SHARED_BYTES

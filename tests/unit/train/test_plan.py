"""A plan that was too large after all: the smaller one that replaces it, and the training that goes on with it."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_support import LENGTH, ROWS, child_pids, finish, losses, metrics, start_base, wait_for, write_run

from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.train.distributed import World
from nanochat.train.plan import OUT_OF_MEMORY, confirmed_plan, plan_for_capacity, plan_in_force, smaller_plan

ALONE = World(0, 1, torch.device("cpu"))
AFTER_OUT_OF_MEMORY = {"ATTEMPT_REASON": OUT_OF_MEMORY, "ATTEMPT_REASON_COUNT": "1"}


def plan(size: int, rows: int, probed: dict[int, int] | None = None, capacity: int = 100, **more) -> dict:
    probes = [{"device_batch_size": n, "ok": True, "peak_bytes": peak} for n, peak in (probed or {}).items()]
    probes.append({"device_batch_size": 2 * size, "ok": False, "peak_bytes": None})
    sizes = {"device_batch_size": size, "grad_accum_steps": rows // size, "tokens_per_step": rows * LENGTH}
    sizes |= {"sequence_length": LENGTH, "capacity_bytes": capacity, "margin": 0.15, "probes": probes, "key": "k"}
    return {"stage": "base", "gpus": 1, **sizes, **more}


@pytest.fixture(autouse=True)
def no_attempt(monkeypatch):
    for name in ("ATTEMPT_REASON", "ATTEMPT_REASON_COUNT", "ATTEMPT_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_the_smaller_plan_leaves_the_larger_margin_free():
    made = plan(48, 96, {1: 20, 16: 35, 48: 67})
    once, twice = smaller_plan(made, 1, ranks=1), smaller_plan(made, 2, ranks=1)
    # 0.75 of 100 is above the peak that failed: fewer rows all the same. 0.65 leaves 32, which is taken only once.
    assert (once["device_batch_size"], once["peak_bytes"], once["margin"]) == (32, 51, 0.25)
    assert (twice["device_batch_size"], twice["margin"]) == (24, 0.35)
    assert once["grad_accum_steps"] == 3
    assert once["tokens_per_step"] == made["tokens_per_step"]


def test_a_steep_law_skips_divisors_that_would_not_fit():
    assert (
        smaller_plan(plan(32, 64, {1: 10, 32: 150}), 1, ranks=1)["device_batch_size"] == 8
    )  # 8 rows take 42, 16 take 78


@given(
    rows=st.integers(1, 200),
    index=st.integers(0, 100),
    times=st.integers(1, 4),
    fixed=st.integers(0, 80),
    slope=st.integers(0, 9),
    probed=st.booleans(),
)
def test_a_smaller_plan_is_smaller_and_keeps_the_tokens(rows, index, times, fixed, slope, probed):
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    size = divisors[index % len(divisors)]
    made = plan(size, rows, {n: fixed + slope * n for n in (1, size)} if probed else None)
    if divisors.index(size) < times and not probed:
        with pytest.raises(UserError, match=r"Lower train\.base\.sequence_length, model\.depth"):
            smaller_plan(made, times, ranks=1)
        return
    try:
        smaller = smaller_plan(made, times, ranks=1)
    except UserError:
        assert divisors.index(size) < times or fixed + slope * size > 0.75 * 100
        return
    assert smaller["device_batch_size"] < size
    assert smaller["device_batch_size"] * smaller["grad_accum_steps"] == rows
    assert smaller["tokens_per_step"] == made["tokens_per_step"]


def test_a_smaller_plan_is_measured_again_until_it_fits():
    """The probes foretell 51, 42 and 35 of 100 at 32, 24 and 16 rows; now other things use the GPU too."""
    smaller = smaller_plan(plan(48, 96, {1: 20, 16: 35, 48: 67}), 1, ranks=1)
    now = {32: float("inf"), 24: 80, 16: 74}
    confirmed = confirmed_plan(smaller, 1, lambda one: now[one["device_batch_size"]])
    assert (confirmed["device_batch_size"], confirmed["grad_accum_steps"], confirmed["peak_bytes"]) == (16, 6, 74)
    assert confirmed_plan(smaller, 1, lambda one: None) == smaller
    with pytest.raises(UserError, match="with 1 row a micro-batch"):
        confirmed_plan(smaller, 1, lambda one: float("inf"))


def test_a_smaller_gpu_takes_fewer_rows():
    made = plan(48, 96, {1: 20, 16: 35, 48: 67})
    assert plan_for_capacity(made, 99, ranks=1) == made
    assert plan_for_capacity(made, None, ranks=1) == made
    smaller = plan_for_capacity(made, 50, ranks=1)  # 42 with the margin: 16 rows take 35, 24 take 43
    assert (smaller["device_batch_size"], smaller["grad_accum_steps"], smaller["peak_bytes"]) == (16, 6, 35)
    with pytest.raises(UserError, match="does not fit in a GPU"):
        plan_for_capacity(made, 20, ranks=1)


def test_each_out_of_memory_makes_the_plan_smaller_once(tmp_path, monkeypatch):
    """Also when SLURM requeues the smaller plan's job: its environment stays."""
    cache = tmp_path / "cache.json"
    path, out = tmp_path / "plan.json", tmp_path / "base"
    original = plan(8, 8, cache=str(cache))
    write_json(path, original)
    write_json(cache, {"key": "k", "probes": [{"device_batch_size": 4, "ok": False, "seconds": 1.0, "note": None}]})

    def start(token: str, count: int = 0) -> int:
        monkeypatch.setenv("ATTEMPT_TOKEN", token)
        monkeypatch.setenv("ATTEMPT_REASON", OUT_OF_MEMORY if count else "walltime")
        monkeypatch.setenv("ATTEMPT_REASON_COUNT", str(count or 1))
        return plan_in_force(path, out, 8 * LENGTH, LENGTH, ALONE)["device_batch_size"]

    assert [start("1-100-0"), start("2-100-1")] == [8, 8]
    assert [start("3-101-0", 1), start("4-101-1", 1), start("5-102-0")] == [4, 4, 4]
    assert [one["device_batch_size"] for one in read_json(cache)["probes"]] == [4, 8], "8 rows are not tried again"
    assert start("6-103-0", 2) == 2
    assert start("7-104-0", 1) == 1  # a driver that was started again counts anew
    with pytest.raises(UserError, match="with 1 row a micro-batch"):
        start("8-105-0", 2)
    assert read_json(path) == original
    write_json(path, original | {"key": "another model"})
    assert start("9-106-0") == 8


def test_all_ranks_hear_why_there_is_no_plan(tmp_path):
    shared = []

    class Ranks(World):
        def share(self, value):
            shared.append(value)
            return shared[0]

    for rank in (0, 1):
        with pytest.raises(UserError, match="no such file"):
            plan_in_force(tmp_path / "none.json", tmp_path, LENGTH, LENGTH, Ranks(rank, 2, torch.device("cpu")))
    assert shared[1] == "", "only rank 0 reads"


@pytest.mark.slow
def test_training_goes_on_with_the_smaller_plan(tmp_path):
    """Two ranks ended by an out-of-memory, then one requeue without the reason: the curve is that of an undisturbed run."""
    straight = write_run(tmp_path / "a", steps=120)
    assert finish(start_base(straight))[0] == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = write_run(tmp_path / "b", steps=120, checkpoint_every_seconds=0.0)
    folder = Path(run["--checkpoints"])

    def interrupted(beyond: int, **environment: str) -> int:
        """Start, let it save a checkpoint after `beyond` steps, kill it; returns the newest step."""
        process = start_base(run, launcher, **environment)
        wait_for(lambda: max(steps(folder), default=0) > beyond, process)
        for rank in child_pids(process.pid):
            os.kill(rank, signal.SIGKILL)
        process.communicate()
        return max(steps(folder))

    first = interrupted(0)
    newest = interrupted(first, **AFTER_OUT_OF_MEMORY)
    assert read_json(folder / f"step-{newest:08}" / "state.json")["plan"]["device_batch_size"] == 2
    code, output = finish(start_base(run, launcher))
    assert code == 0, output
    assert "2 rows a micro-batch" in output
    assert "going on from" in output
    trained = metrics(run)["plan"]
    assert (trained["device_batch_size"], trained["grad_accum_steps"]) == (2, 2)
    assert "ran out of memory" in trained["reason"]
    assert metrics(run)["tokens"] == metrics(straight)["tokens"] == 120 * ROWS * LENGTH
    assert losses(Path(run["--out"])) == pytest.approx(losses(Path(straight["--out"])), rel=2e-3)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]

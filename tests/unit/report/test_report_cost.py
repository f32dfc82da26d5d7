"""Money: whatever the ledger and the logs say, the parts sum to the whole."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_run import Writer, write_run

from nanochat.report.cost import LOST, PARTS, USEFUL, account
from nanochat.report.ledger import Attempt, busy_seconds, read_attempts, waits
from nanochat.report.read import Run
from nanochat.report.steps import Step, read_steps

STATES = (
    "COMPLETED",
    "FAILED",
    "PREEMPTED",
    "REQUEUED",
    "TIMEOUT",
    "NODE_FAIL",
    "CANCELLED",
    "RUNNING",
    "SUSPENDED",
    "ODD",
)

attempts = st.builds(
    Attempt,
    rule=st.sampled_from(["base", "mid", "corpus", "evaluate_stage"]),
    wildcards=st.just(()),
    job_id=st.integers(1, 5).map(str),
    attempt=st.integers(1, 3),
    restart=st.integers(0, 3),
    partition=st.none(),
    nodes=st.none(),
    gpus=st.integers(0, 8),
    gpu_type=st.none(),
    cpus=st.none() | st.integers(1, 64),
    submitted=st.none(),
    eligible=st.none(),
    started=st.none() | st.floats(1000, 2000),
    ended=st.none() | st.floats(1000, 3000),
    state=st.sampled_from(STATES),
    reason=st.none(),
    exit_code=st.none(),
)
seconds = st.floats(0, 400)
steps = st.builds(
    Step,
    step=st.integers(0, 20),
    loss=st.just(1.0),
    val_bpb=st.none(),
    seconds=st.none() | seconds,
    ended=st.none() | st.floats(900, 3100),
    validation_seconds=st.none() | seconds,
    checkpoint_seconds=st.none() | seconds,
    survives=st.booleans(),
)


@given(
    st.lists(attempts, max_size=8, unique_by=lambda one: one.identity),
    st.lists(steps, max_size=20),
    st.lists(steps, max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_charged_is_useful_plus_lost(tried, base, mid):
    books = account(tried, {"base": base, "mid": mid})
    charged = sum(one.gpus * one.seconds for one in tried) / 3600
    assert books.hours("GPU") == pytest.approx(charged)
    for resource in ("GPU", "CPU"):
        assert books.hours(resource) == pytest.approx(books.hours(resource, USEFUL) + books.lost(resource), abs=1e-9)
        by_stage = sum(books.hours(resource, stages=[stage]) for stage in books.stages())
        assert books.hours(resource) == pytest.approx(by_stage, abs=1e-9)
    for charge in books.charges:
        assert set(charge.seconds) == set(PARTS)
        assert all(value >= 0 for value in charge.seconds.values())
        assert sum(charge.seconds.values()) == pytest.approx(charge.attempt.seconds, abs=1e-6)
    assert books.goodput() is None or 0 <= books.goodput() <= 1 + 1e-9


@given(st.lists(attempts, max_size=8, unique_by=lambda one: one.identity))
@settings(deadline=None)
def test_only_training_steps_are_useful(tried):
    books = account([one for one in tried if one.rule in ("corpus", "evaluate_stage")], {})
    assert books.hours("GPU", USEFUL) == books.hours("CPU", USEFUL) == 0


@given(st.lists(attempts, max_size=8))
def test_busy_time_is_that_of_the_longest_at_least_and_of_all_at_most(tried):
    known = [one for one in tried if one.started is not None and one.ended is not None and one.ended >= one.started]
    spans = [one.seconds for one in known]
    assert max(spans, default=0) - 1e-6 <= busy_seconds(known) <= sum(spans) + 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    results = tmp_path_factory.mktemp("run") / "results"
    return Run(results), write_run(results).clock


def test_every_cause_of_loss_is_found(run):
    run, now = run
    attempts = read_attempts(run, now)
    books = account(attempts, {stage: read_steps(run, stage) for stage in ("base", "mid", "sft")})
    lost = {part: books.hours("GPU", part) * 3600 / 4 for part in LOST}
    # 30 steps of about 2 s were done twice: the node was lost at 330, the last checkpoint was that of 300.
    assert lost["replayed"] == pytest.approx(30 * 2, rel=0.05)
    # Preempted 12 s after its last step.
    assert lost["grace"] == pytest.approx(12, abs=0.1)
    # Two attempts of base, one of mid, one of sft; a first step takes 8 steps' time, 7 of it compiling. The lost node's is failed.
    assert lost["startup"] == pytest.approx(40 + 38 + 30 + 30 + 7 * (2 + 2 + 1 + 1), rel=0.05)
    assert lost["failed"] > 48
    # Read from the gaps between steps; those of the failed attempts stand with them.
    assert lost["validation"] == pytest.approx(8 * (3 + 6) + 4 * (4 + 3), rel=0.05)
    assert lost["checkpoints"] == pytest.approx(0.5 * (2 + 5 + 3 + 2), rel=0.1)
    useful = books.hours("GPU", USEFUL) * 3600 / 4
    assert useful == pytest.approx(600 * 2 + 200 + 120, rel=0.02)
    assert books.goodput(["base", "mid", "sft"]) > books.goodput()


def test_queue_wait_and_requeue_delay_are_apart(run):
    run, now = run
    attempts = read_attempts(run, now)
    found = waits(attempts)
    base = [one for one in attempts if one.stage == "base"]
    assert [found[one.identity] for one in base] == [(180, None), (None, 130), (240, None)]


def test_the_running_report_is_counted_until_now(run):
    run, now = run
    report = next(one for one in read_attempts(run, now) if one.stage == "report")
    assert (report.state, report.end_is, report.seconds) == ("RUNNING", "now", 9)


def test_a_replaced_attempt_without_an_end_is_bounded(tmp_path):
    writer = Writer(tmp_path / "results")
    writer.job("base", 0, state="RUNNING", gpus=1)
    started = writer.clock
    writer.clock += 100  # the driver was killed here, with the job
    writer.job("base", 50, gpus=1, wait=5)
    first, second = read_attempts(Run(tmp_path / "results"), writer.clock + 1e6)
    assert (first.started, first.end_is, first.seconds) == (started, "bounded", 100)
    assert (second.end_is, second.seconds) == ("recorded", 50)


def test_a_job_whose_log_is_silent_for_a_day_is_not_counted_until_now(tmp_path):
    """A report by hand, ten days after the driver and its job had died, charged 960 GPU-hours."""
    writer = Writer(tmp_path / "results")
    record = writer.job("base", 0, state="RUNNING", gpus=4)
    started = record["started"]
    writer.lines("jobs/ledger.jsonl", [{**record, "log": "runs/a/base/base.log", "folder": "runs/a/jobs/base-x"}])
    log = tmp_path / "results/base/base.log"
    log.parent.mkdir(parents=True)
    log.touch()
    os.utime(log, (started + 600, started + 600))
    (attempt,) = read_attempts(Run(tmp_path / "results"), started + 10 * 86400)
    assert (attempt.end_is, attempt.seconds) == ("silent", 600)
    (attempt,) = read_attempts(Run(tmp_path / "results"), started + 3600)
    assert (attempt.end_is, attempt.seconds) == ("now", 3600)


def test_a_delay_by_a_requeue_is_unknown_without_the_run_before(tmp_path):
    writer = Writer(tmp_path / "results")
    record = writer.job("base", 50, gpus=1)
    writer.lines("jobs/ledger.jsonl", [{**record, "restart": 1, "started": record["started"] + 18_000, "ended": None}])
    (tmp_path / "results/jobs/ledger.jsonl").write_text(
        (tmp_path / "results/jobs/ledger.jsonl").read_text().splitlines()[-1] + "\n"
    )
    (attempt,) = read_attempts(Run(tmp_path / "results"), writer.clock + 1e5)
    assert waits([attempt]) == {attempt.identity: (None, None)}


def test_the_save_at_the_end_is_a_checkpoint_too(tmp_path):
    writer = Writer(tmp_path / "results")
    record = writer.job("base", 100, gpus=1)
    times = [record["started"] + 10 + second for second in range(1, 61)]
    writer.lines("base/log.jsonl", [{"step": i + 1, "loss": 1, "seconds": 1, "time": t} for i, t in enumerate(times)])
    run = Run(tmp_path / "results")
    attempts, steps = read_attempts(run, writer.clock), {"base": read_steps(run, "base")}
    books = account(attempts, steps, {"base": 7.0})
    parts = {part: round(books.hours("GPU", part) * 3600) for part in ("useful", "startup", "checkpoints", "rest")}
    assert parts == {"useful": 60, "startup": 10, "checkpoints": 7, "rest": 23}


def test_an_end_that_only_the_job_wrote_down_counts(tmp_path):
    """The driver was killed; the run it saw ended, and SLURM ran the job again."""
    writer = Writer(tmp_path / "results")
    record = writer.job("base", 0, state="RUNNING", gpus=4)
    start = record["started"]
    writer.lines("jobs/ledger.jsonl", [{**record, "folder": "results/jobs/base-x"}])
    ended = {"state": "ended", "kind": "checkpointed", "exit_code": 85, "started": start, "ended": start + 7200}
    writer.json("jobs/base-x/status-0.json", ended)
    (first,) = read_attempts(Run(tmp_path / "results"), start + 1e6)
    assert (first.state, first.end_is, first.seconds) == ("REQUEUED", "recorded", 7200)
    again = {"state": "ended", "kind": "success", "exit_code": 0, "started": start + 9000, "ended": start + 9060}
    writer.json("jobs/base-x/status-1.json", again)
    attempts = read_attempts(Run(tmp_path / "results"), start + 1e6)
    assert [(one.restart, one.state, one.seconds) for one in attempts] == [(0, "REQUEUED", 7200), (1, "COMPLETED", 60)]


def test_a_stage_run_again_counts_the_first_run_as_superseded(tmp_path):
    writer = Writer(tmp_path / "results")
    writer.job("mid", 100, gpus=2)
    writer.job("mid", 60, gpus=2)
    attempts = read_attempts(Run(tmp_path / "results"), writer.clock)
    books = account(attempts, {})
    assert books.hours("GPU", "superseded") == pytest.approx(200 / 3600)
    assert books.hours("GPU") == pytest.approx(320 / 3600)


def test_a_run_over_several_walltimes_is_superseded_whole_but_for_its_failures(tmp_path):
    writer = Writer(tmp_path / "results")
    for seconds, state in ((50, "FAILED"), (200, "REQUEUED"), (100, "COMPLETED"), (7, "REQUEUED"), (60, "COMPLETED")):
        writer.job("mid", seconds, gpus=2, state=state)
    books = account(read_attempts(Run(tmp_path / "results"), writer.clock), {})
    assert books.hours("GPU", "superseded") == pytest.approx(600 / 3600)
    assert books.hours("GPU", "failed") == pytest.approx(100 / 3600)
    assert books.hours("GPU") == pytest.approx(834 / 3600)


def test_the_newest_line_wins_and_damaged_ones_are_named(tmp_path):
    writer = Writer(tmp_path / "results")
    writer.job("corpus", 10)
    ledger = tmp_path / "results/jobs/ledger.jsonl"
    with open(ledger, "a") as file:
        file.write('{"rule": "base", "job_id": \n')
        file.write('["another version"]\n')
        file.write('{"version": 9, "name": "base"}\n')
        file.write(
            '{"rule": "mid", "job_id": 7, "started": "2026-01-02T03:04:05", "state": "CANCELLED by 0", "ended": "Unknown"}\n'
        )
        file.write('{"rule": "sft", "job_id": "8", "sta')
    run = Run(tmp_path / "results")
    found = {one.stage: one for one in read_attempts(run, writer.clock)}
    assert set(found) == {"corpus", "mid"}
    assert found["corpus"].state == "COMPLETED"
    assert (found["mid"].state, found["mid"].end_is, found["mid"].seconds) == ("CANCELLED", "unknown", 0)
    assert any("2 unreadable lines" in note for note in run.notes)
    assert any("1 line of an unknown form" in note for note in run.notes)


@given(st.lists(st.integers(0, 30), max_size=60))
def test_the_last_line_for_a_step_wins(tmp_path_factory, order):
    results = tmp_path_factory.mktemp("log") / "results"
    Writer(results).lines("base/log.jsonl", [{"step": step, "loss": index} for index, step in enumerate(order)])
    kept = [step for step in read_steps(Run(results), "base") if step.survives]
    numbers = [step.step for step in kept]
    assert numbers == sorted(set(numbers))
    last = {step: index for index, step in enumerate(order)}
    assert all(step.loss == last[step.step] for step in kept)
    assert not order or numbers[-1] == order[-1]

"""What the driver makes of a cluster that refuses, or does not answer."""

import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_executor_plugin_submitit import ExecutorSettings, driver, exits, ledger, resources, work
from snakemake_executor_plugin_submitit.failures import NotReached
from snakemake_executor_plugin_submitit.status import LAUNCH_FAILED, Observation


class Cluster:
    """In place of SLURM: job 100 ends in `state`; later submissions meet `answers`, None for accepted."""

    name = "slurm"

    def __init__(self, state: str, answers: list[Exception | None]):
        self.state, self.answers, self.accepted, self.asked = state, answers, 0, []
        self.cannot_cancel: list[str] = []

    def submit(self, allocation, submission):
        self.asked.append(submission.request.memory_mb)
        answer = self.answers.pop(0) if self.accepted else None
        if answer:
            raise answer
        submission.record["job_id"] = str(100 + self.accepted)
        self.accepted += 1

    def observe(self, submissions):
        now = time.time()
        ended = Observation(self.state, started=now - 5, ended=now, nodes=["n1"])
        return {one.job_id: ended if one.job_id == "100" else Observation("RUNNING") for one in submissions}

    def ended(self, submissions):
        return {}

    def cancel(self, submissions):
        return self.cannot_cancel


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that submits a job of 256,000 MB to a cluster, and gives driver and submission."""
    monkeypatch.chdir(tmp_path)

    def submitted(cluster, step=None):
        made = driver.Driver(ExecutorSettings(cluster="local", folder="jobs"), logging.getLogger("test"), {}, 2)
        made.cluster, made.poll_seconds = cluster, 0
        record = ledger.new_record(rule="base", wildcards={}, attempt=1, cluster="slurm", log="base.log", key="k")
        one = work.Submission(record, resources.Request(memory_mb=256_000), Path(), Path("token"))
        made._submit(one, "base", "command")
        if step:
            exits.write_whole(exits.status_path(one.folder, 0), json.dumps({"state": "running", "step": step}))
        return made, one

    return submitted


REFUSED = ValueError("rule base: sbatch refused the job: Requested node configuration is not available")


def test_a_refused_resubmission_ends_the_job_with_the_clusters_words(job):
    """It was told as 'out of host memory, tried 4 times' after one run, with four times the memory asked for."""
    cluster = Cluster("OUT_OF_MEMORY", [REFUSED])
    made, one = job(cluster)
    outcome = made.look([one])["100"]
    assert "Requested node configuration is not available" in outcome.message
    assert outcome.final
    assert cluster.asked == [256_000, 384_000]
    assert (one.job_id, one.resubmitted, one.request.memory_mb) == ("100", {}, 256_000)


def test_a_cluster_that_does_not_answer_is_asked_again_and_the_job_goes_on(job):
    """Judged a second time, the same walltime would be one without progress."""
    cluster = Cluster("TIMEOUT", [NotReached("sbatch: Socket timed out"), NotReached("sbatch: Socket timed out"), None])
    made, one = job(cluster, step=500)
    assert made.look([one]) == made.look([one]) == {}
    assert one.job_id == "100"
    assert made.look([one]) == {}
    assert one.job_id == "101"
    assert (one.step, sum(one.resubmitted.values())) == (500, 1)
    records = ledger.read_attempts(made.ledger)
    assert [(record["job_id"], record["state"]) for record in records] == [("100", "TIMEOUT"), ("101", "PENDING")]


@pytest.mark.parametrize("own", [False, True])
def test_a_failure_is_not_explained_by_the_log_of_an_attempt_before(job, own):
    log = Path("base.log")
    log.write_text("loss is not finite\n")
    os.utime(log, (time.time() - 100, time.time() - 100))
    made, one = job(Cluster("FAILED", []))
    (one.folder / "100_submitted.pkl").write_text("")
    (one.folder / "100_0_log.err").write_text("bash: module: command not found\n")
    if own:
        log.write_text("no such column\n")
    message = made.look([one])["100"].message
    assert ("base.log" in message, "no such column" in message) == (own, own)
    assert "command not found" in message or own
    assert "not finite" not in message


def test_a_status_that_cannot_be_read_is_none_yet(tmp_path, monkeypatch):
    def stale(path, *_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    assert exits.read_status(tmp_path, 0) is None
    assert exits.read_json(tmp_path / "ranks-0.json") is None


@pytest.mark.parametrize(("cannot", "state"), [([], "CANCELLED"), (["100"], "PENDING")])
def test_a_job_that_could_not_be_cancelled_stays_open(job, cannot, state):
    """It runs on and holds its GPUs: the next run adopts it, and accounts for it."""
    cluster = Cluster("RUNNING", [])
    made, _ = job(cluster)
    cluster.cannot_cancel = cannot
    made.cancel()
    (record,) = ledger.read_attempts(made.ledger)
    assert record["state"] == state
    assert ledger.has_open_jobs(made.folder) == bool(cannot)


def test_a_ledger_that_cannot_be_written_for_a_moment_loses_no_job(job, caplog):
    """A job that is not in it would be submitted a second time by the next driver."""
    made, one = job(Cluster("RUNNING", [None]))
    made.ledger.unlink()
    made.ledger.mkdir()  # written, it is an OSError
    made._submit(one, "base", "command")
    made.look([one])
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"{made.ledger}: not written: Is a directory; ")
    made.ledger.rmdir()
    made.look([one])
    assert [record["job_id"] for record in ledger.read_attempts(made.ledger)] == ["101"]


def test_a_full_disk_submits_a_job_again_later(job):
    cluster = Cluster("NODE_FAIL", [OSError(28, "No space left on device"), None])
    made, one = job(cluster)
    assert made.look([one]) == made.look([one]) == {}
    assert (one.job_id, one.resubmitted) == ("101", {"node_failure": 1})


@pytest.mark.parametrize(("changed_by", "out_of_date"), [(0, False), (5, True), (-5, False)])
def test_a_job_is_out_of_date_once_an_input_changed_whatever_the_file_servers_clock(tmp_path, changed_by, out_of_date):
    path = tmp_path / "tokens.json"
    path.write_text("{}")
    ahead = time.time() + 60
    os.utime(path, (ahead, ahead))
    task = SimpleNamespace(input=[path])
    record = {"submitted": time.time(), "newest_input": work.newest_input(task)}
    os.utime(path, (ahead + changed_by, ahead + changed_by))
    assert work.is_out_of_date(record, task) == out_of_date
    assert work.is_out_of_date({"submitted": time.time()}, task)  # of an older ledger: only its driver's clock is known
    assert not work.is_out_of_date(record, SimpleNamespace(input=["none"]))


class FailsToLaunch(Cluster):
    """Job 100 is held after its launch failed at once: no look sees it on a node, only accounting has named one."""

    def submit(self, allocation, submission):
        super().submit(allocation, submission)
        self.exclude = submission.request.exclude

    def observe(self, submissions):
        run = Observation("NODE_FAIL", started=1.0, ended=2.0, nodes=["n7"])
        held = Observation("PENDING", LAUNCH_FAILED, restart=1, earlier=[run], launch_failed=True)
        return {one.job_id: held if one.job_id == "100" else Observation("RUNNING") for one in submissions}


@pytest.mark.parametrize(("answers", "exclude"), [([None], ("n7",)), ([REFUSED, None], ())])
def test_a_job_whose_launch_failed_at_once_goes_to_another_node_where_there_is_one(job, answers, exclude):
    cluster = FailsToLaunch("PENDING", answers)
    made, one = job(cluster)
    assert made.look([one]) == made.look([one]) == {}
    assert (one.job_id, cluster.exclude, one.resubmitted) == ("101", exclude, {"node_failure": 1})
    assert ledger.read_attempts(made.ledger)[0]["node_names"] == ["n7"]

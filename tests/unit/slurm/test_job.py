"""Inside an allocation: true exit codes, signals that reach the trainer, nothing left behind, tokens."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from snakemake_executor_plugin_submitit.exits import read_status
from snakemake_executor_plugin_submitit.job import BASH_SETUP, Allocation, new_token, newest_step

START = """
import json, sys
from snakemake_executor_plugin_submitit.job import Allocation
Allocation(**json.load(open(sys.argv[1])))()
"""
TRAINER = """
import os, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: asked.append(1))
print("ready", flush=True)
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
open("saved", "w").write("x")
print("base  step 7/9", flush=True)
sys.exit(85)
"""


def start(folder: Path, command: str, **fields) -> subprocess.Popen:
    """The allocation in a process of its own, as submitit runs it."""
    (folder / "trainer.py").write_text(TRAINER)
    allocation = Allocation(
        command,
        str(folder / "job"),
        str(folder),
        str(folder / "tokens/base"),
        job_id="7",
        log=str(folder / "log"),
        **fields,
    )
    (folder / "allocation.json").write_text(json.dumps(vars(allocation)))
    return subprocess.Popen([sys.executable, "-c", START, folder / "allocation.json"])


def finish(process: subprocess.Popen, folder: Path) -> dict:
    process.wait(30)
    return read_status(folder / "job", 0)


def wait_for(path: Path, text: str = "") -> None:
    end = time.time() + 15
    while time.time() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} without {text!r}")


@pytest.mark.parametrize(
    ("command", "code", "kind"),
    [
        ("bash -c 'exit 0'", 0, "success"),
        # an inner Snakemake ends with 1 whatever the rule's bash ended with
        ("bash -c 'set -e; (exit 2)' || exit 1", 2, "user_error"),
        ("bash -c 'exit 86' || exit 1", 86, "cuda_out_of_memory"),
        ("bash -c 'kill -9 $BASHPID' || exit 1", 1, "program"),
        ("bash -c 'bash -c \"exit 87\"' || exit 1", 87, "loss_not_finite"),
        ("bash -c true; exit 1", 1, "outputs"),
        ("exit 3", 3, "program"),
    ],
)
def test_the_true_exit_code_is_kept(tmp_path, command, code, kind):
    process = start(tmp_path, command)
    status = finish(process, tmp_path)
    assert (status["exit_code"], status["kind"], status["state"]) == (code, kind, "ended")
    assert process.returncode == code
    assert status["started"] <= status["ended"]


ODD_PATHS = ["a b", "it's", 'a "b"', "$HOME", "`id`", "$(id)", "back\\slash", "a;b & c"]


@pytest.mark.parametrize("name", ODD_PATHS)
def test_bash_keeps_its_exit_code_under_any_path(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    setup, exit_codes = tmp_path / "setup", folder / "exit-codes-0"
    setup.write_text(BASH_SETUP.format(previous="''", exit_codes=shlex.quote(str(exit_codes))))
    environment = {**os.environ, "BASH_ENV": str(setup)}
    done = subprocess.run(["bash", "-c", "exit 85"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, exit_codes.read_text()) == (85, "", "85\n")


@pytest.mark.parametrize("name", ["a b", "it's $HOME `id` \\ \""])
def test_the_true_exit_code_is_kept_under_any_path(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    status = finish(start(folder, "bash -c 'exit 86' || exit 1"), folder)
    assert (status["exit_code"], status["kind"]) == (86, "cuda_out_of_memory")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_the_trainer_and_nothing_dies_before_it_saved(tmp_path, number):
    process = start(tmp_path, f"bash -c '{sys.executable} trainer.py > log' || exit 1")
    wait_for(tmp_path / "log", "ready")
    process.send_signal(number)
    status = finish(process, tmp_path)
    assert (tmp_path / "saved").exists()
    assert status["exit_code"] == 85
    assert status["kind"] == ("cancelled" if number == signal.SIGTERM else "checkpointed")
    assert (status["asked"], status["step"]) == (number.name, 7)


def test_who_does_not_know_usr2_does_not_die_of_it(tmp_path):
    process = start(tmp_path, "bash -c 'echo ready > log; sleep 1; touch done'")
    wait_for(tmp_path / "log", "ready")
    process.send_signal(signal.SIGUSR2)
    assert finish(process, tmp_path)["exit_code"] == 0
    assert (tmp_path / "done").exists()


def test_a_second_signal_while_a_trainer_exits_does_no_harm(tmp_path):
    """Python restores the default of a signal when it ends, so the second one kills it with the checkpoint already there."""
    (tmp_path / "late.py").write_text(
        TRAINER.replace("sys.exit(85)", "signal.signal(signal.SIGUSR2, signal.SIG_DFL); time.sleep(60)")
    )
    process = start(tmp_path, f"bash -c '{sys.executable} late.py > log' || exit 1")
    wait_for(tmp_path / "log", "ready")
    process.send_signal(signal.SIGUSR2)
    wait_for(tmp_path / "saved")
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR2)
    status = finish(process, tmp_path)
    assert (status["exit_code"], status["kind"]) == (85, "checkpointed")


def test_the_exit_code_is_known_before_the_last_process_is_gone(tmp_path):
    """One that hangs is killed by SLURM at the end of the grace time, and this job with it."""
    hanging = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); open('hangs', 'w'); time.sleep(60)"
    (tmp_path / "hanging.py").write_text(hanging)
    process = start(tmp_path, f"bash -c '{sys.executable} hanging.py & {sys.executable} trainer.py > log' || exit 1")
    wait_for(tmp_path / "log", "ready")
    wait_for(tmp_path / "hangs")
    process.send_signal(signal.SIGUSR2)
    wait_for(tmp_path / "job/status-0.json", '"exit_code": 85')
    children = psutil.Process(process.pid).children(recursive=True)
    status = read_status(tmp_path / "job", 0)
    for one in (process, *children):
        one.kill()
    assert children
    assert (status["state"], status["kind"], status["step"]) == ("running", "checkpointed", 7)


def test_cancelling_ends_the_whole_tree(tmp_path):
    """Also what has left the process group, and what ignores the request."""
    stubborn = "import signal, time, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('pids', 'a').write(f'{os.getpid()}\\n'); time.sleep(60)"
    (tmp_path / "stubborn.py").write_text(stubborn)
    command = f"bash -c 'setsid {sys.executable} stubborn.py & {sys.executable} stubborn.py & echo ready > log; wait'"
    process = start(tmp_path, command, grace_seconds=1.0)
    wait_for(tmp_path / "log", "ready")
    wait_for(tmp_path / "pids", "\n")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    status = finish(process, tmp_path)
    assert status["kind"] == "cancelled"
    for pid in (tmp_path / "pids").read_text().split():
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_newer_attempt_ends_this_one(tmp_path):
    process = start(tmp_path, "bash -c 'echo ready > log; sleep 60'")
    wait_for(tmp_path / "log", "ready")
    new_token(str(tmp_path / "tokens/base"), "8", 0)
    process.send_signal(signal.SIGUSR2)  # wakes it: in life it looks every few seconds
    status = finish(process, tmp_path)
    assert (status["exit_code"], status["kind"]) == (88, "stale")


def test_tokens_sort_by_attempt(tmp_path):
    tokens = [new_token(str(tmp_path / "token"), str(job), restart) for job in (9, 10) for restart in range(6)]
    assert tokens == sorted(tokens)
    assert (tmp_path / "token").read_text() == tokens[-1]


def test_the_job_knows_its_token(tmp_path):
    start_ = start(tmp_path, "bash -c 'echo $ATTEMPT_TOKEN $(cat $ATTEMPT_TOKEN_FILE) > out'")
    status = finish(start_, tmp_path)
    assert (tmp_path / "out").read_text().split() == [status["token"]] * 2


def test_gpus_are_those_received_and_none_are_hidden(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = start(tmp_path / "a", "bash -c 'echo $CUDA_VISIBLE_DEVICES > out'", gpus=1, visible_gpus=["4", "5"])
    assert finish(one, tmp_path / "a")["gpus"] == [(tmp_path / "a/out").read_text().strip()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what submitit does to a job without GPUs
    none = start(
        tmp_path / "b", "bash -c 'echo ${CUDA_VISIBLE_DEVICES-unset} > out'", original_cuda_visible_devices="4,5"
    )
    finish(none, tmp_path / "b")
    assert (tmp_path / "b/out").read_text().strip() == "4,5"


def test_bash_env_of_the_site_still_works(tmp_path, monkeypatch):
    (tmp_path / "site").write_text("export FROM_SITE=yes\n")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "site"))
    process = start(tmp_path, "bash -c 'echo $FROM_SITE $BASH_ENV > out; exit 2' || exit 1")
    assert finish(process, tmp_path)["exit_code"] == 2
    assert (tmp_path / "out").read_text().split() == ["yes", str(tmp_path / "site")]


def test_the_newest_step_of_a_log(tmp_path):
    (tmp_path / "log").write_text("base  step 1/9\nbase  step 12/20  loss 3\nsaved\n")
    assert newest_step(str(tmp_path / "log")) == 12
    assert newest_step(str(tmp_path / "none")) is None


def test_a_token_that_cannot_be_read_for_a_moment_ends_nothing(tmp_path):
    (tmp_path / "token").mkdir()  # read, it is an OSError that is not "no such file"
    assert Allocation("true", str(tmp_path), str(tmp_path), str(tmp_path / "token"))._newest_token() == ""

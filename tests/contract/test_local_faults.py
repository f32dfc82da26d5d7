"""Jobs on this machine outlive their driver, get time to save when cancelled, and fail with words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from snakemake_executor_plugin_submitit.ledger import read_attempts

TRAINER = """
import os, signal, sys, time
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: asked.append(1))
open("starts", "a").write("x\\n")
for step in range(1, 13):
    time.sleep(0.5)
    print(f"train  step {step}/12", flush=True)
    if asked:
        open("saved", "w").write(str(step))
        sys.exit(85)
"""
TRAIN = """
rule train:
    output: "out/train"
    log: "log/train.log"
    shell: "python trainer.py > {log} 2>&1; touch {output}"
"""


def start(folder: Path, snakefile: str, *arguments: str, output: str = "driver.log") -> subprocess.Popen:
    (folder / "Snakefile").write_text(snakefile)
    (folder / "trainer.py").write_text(TRAINER)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--executor",
        "submitit",
        "--submitit-cluster",
        "local",
        "--jobs",
        "4",
    ]
    command += [
        "--scheduler",
        "greedy",
        "--nolock",
        "--rerun-incomplete",
        "--quiet",
        "host",
        "--cores",
        "all",
        *arguments,
    ]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(folder / output, "a") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            # Where these tests run in the background of a shell, SIGINT is ignored, and would stay so.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_for(path: Path, text: str = "") -> None:
    end = time.time() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.time() < end, f"{path} without {text!r}"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_drivers_job_is_adopted_and_not_run_twice(tmp_path):
    first = start(tmp_path, TRAIN)
    wait_for(tmp_path / "log/train.log", "step 3/")
    first.kill()
    first.wait()
    second = start(tmp_path, TRAIN)
    assert second.wait(60) == 0, (tmp_path / "driver.log").read_text()
    assert (tmp_path / "starts").read_text().split() == ["x"]
    assert "train: goes on with job" in (tmp_path / "driver.log").read_text()
    (attempt,) = read_attempts(tmp_path / "results/jobs/ledger.jsonl")
    assert attempt["state"] == "COMPLETED"
    assert attempt["ended"] - attempt["started"] > 6


@pytest.mark.slow
def test_no_job_of_submitits_is_left_to_delete_when_python_ends(tmp_path):
    """It looks for files then, which in an ending Python 3.12 fails, once with a traceback for each job."""
    count = 'onsuccess:\n    import gc, submitit\n    print("left", sum(isinstance(o, submitit.LocalJob) for o in gc.get_objects()))\n'
    driver = start(tmp_path, count + 'rule one:\n    output: "out/one"\n    shell: "touch {output}"\n')
    assert driver.wait(60) == 0, (tmp_path / "driver.log").read_text()
    assert "left 0" in (tmp_path / "driver.log").read_text()


@pytest.mark.slow
def test_a_killed_drivers_job_that_nobody_asks_for_is_accounted_for(tmp_path):
    """Its work is done before the next driver needs it, or is no part of what that one makes."""
    snakefile = TRAIN + 'rule other:\n    output: "out/other"\n    shell: "sleep 8; touch {output}"\n'
    first = start(tmp_path, snakefile, "out/train")
    wait_for(tmp_path / "log/train.log", "step 3/")
    first.kill()
    first.wait()
    second = start(tmp_path, snakefile, "out/other")
    assert second.wait(60) == 0, (tmp_path / "driver.log").read_text()
    states = {record["rule"]: record["state"] for record in read_attempts(tmp_path / "results/jobs/ledger.jsonl")}
    assert states == {"train": "COMPLETED", "other": "COMPLETED"}


@pytest.mark.slow
def test_an_out_of_date_job_is_not_adopted(tmp_path):
    changed = TRAIN.replace("touch {output}", "echo new > {output}")
    first = start(tmp_path, TRAIN)
    wait_for(tmp_path / "log/train.log", "step 2/")
    first.kill()
    first.wait()
    second = start(tmp_path, changed)
    assert second.wait(60) == 0, (tmp_path / "driver.log").read_text()
    assert (tmp_path / "out/train").read_text() == "new\n"
    assert (tmp_path / "saved").exists()  # the old one was asked to stop, and saved
    assert [record["state"] for record in read_attempts(tmp_path / "results/jobs/ledger.jsonl")] == [
        "CANCELLED",
        "COMPLETED",
    ]


@pytest.mark.slow
def test_ctrl_c_lets_a_trainer_save(tmp_path):
    driver = start(tmp_path, TRAIN)
    wait_for(tmp_path / "log/train.log", "step 2/")
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: the driver and all that share its process group
    assert driver.wait(30) != 0
    assert (tmp_path / "saved").exists()
    (attempt,) = read_attempts(tmp_path / "results/jobs/ledger.jsonl")
    assert (attempt["state"], attempt["exit_code"]) == ("CANCELLED", 85)


@pytest.mark.slow
def test_a_user_error_is_told_once_and_not_tried_again(tmp_path):
    driver = start(
        tmp_path,
        'rule bad:\n    output: "out/bad"\n    log: "log/bad.log"\n'
        "    shell: \"(seq 40; echo 'config.yaml: x = 3: too many'; exit 2) > {log} 2>&1\"\n",
        *("--retries", "3"),
    )
    assert driver.wait(60) != 0
    said = (tmp_path / "driver.log").read_text()
    assert said.count("| config.yaml: x = 3: too many") == 1
    assert "bad failed (exit code 2)" in said
    assert "log log/bad.log" in said
    assert len(read_attempts(tmp_path / "results/jobs/ledger.jsonl")) == 1


@pytest.mark.slow
def test_more_gpus_than_the_machine_has_are_refused_before_anything_runs(tmp_path):
    snakefile = (
        TRAIN
        + 'rule big:\n    input: "out/train"\n    output: "out/big"\n    resources: gpu=9\n    shell: "touch {output}"\n'
    )
    driver = start(tmp_path, snakefile, "--submitit-gpus", "0,1", "out/big")
    assert driver.wait(60) != 0
    said = (tmp_path / "driver.log").read_text()
    assert "rule big: resources.gpu = 9: this machine has 2 (0, 1)" in said
    assert "Traceback" not in said
    assert not (tmp_path / "starts").exists()


@pytest.mark.slow
def test_what_a_run_is_asked_for_without_effect_is_told_at_its_start(tmp_path):
    """Snakemake passes over a misspelt rule or resource; a resource that a rule of the workflow's own uses is none."""
    rule = (
        'rule one:\n    output: "out/one"\n    resources: rounds=1\n    shell: "echo {resources.rounds} > {output}"\n'
    )
    asked = ["one:walltime=480", "one:rounds=3", "one:runtime=5", "oen:mem_mb=500"]
    driver = start(tmp_path, rule, "--default-resources", "gpu_modell=h100", "--set-resources", *asked)
    assert driver.wait(60) == 0, (tmp_path / "driver.log").read_text()
    said = [line for line in (tmp_path / "driver.log").read_text().splitlines() if "has no effect" in line]
    assert [line.partition(": no such")[0] for line in said] == [
        "set-resources: oen",
        "default-resources: gpu_modell",
        "set-resources: one: walltime",
    ]
    assert [line.rpartition("id you mean ")[2] for line in said] == ["one?", "gpu_model?", "runtime?"]
    assert (tmp_path / "out/one").read_text() == "3\n"


def test_a_full_disk_under_the_drivers_own_output_does_not_stop_the_run(tmp_path):
    """`nohup snakemake ... > run.log &` and the quota is used up: the driver hung, and never submitted the next job."""
    two = (
        TRAIN
        + """
rule next:
    input: rules.train.output
    output: "out/next"
    shell: "touch {output}"
"""
    )
    driver = start(tmp_path, two, "out/next", output="/dev/full")
    try:
        driver.wait(timeout=60)
    finally:
        driver.kill()
    assert (tmp_path / "out/next").exists()

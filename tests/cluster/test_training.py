"""Training outlives preemption, walltime, a lost node and a second writer, and its curve does not show it."""

import os
import signal
import time

import pytest
from loss_curve import read, undisturbed
from slurm_lab import assert_agrees_with_sacct, wait_until

TRAIN = """
rule train:
    output: "out/train.txt"
    log: "log/train.log"
    params: pace={pace}
    resources: gpu={gpus}, gpu_model="a100"
    shell: "python trainer.py state/train {steps} {{params.pace}} > {{log}} 2>&1; cp state/train/checkpoint {{output}}"
"""


def training(steps: int, gpus: int = 4, pace: float = 0.5) -> str:
    return TRAIN.format(steps=steps, gpus=gpus, pace=pace)


def steps_done(driver) -> int:
    curve = driver.folder / "state/train/curve"
    return len(curve.read_text().splitlines()) if curve.exists() else 0


def test_preemption_loses_no_step(run, cluster):
    driver = run(training(40, gpus=8), "--set-resources", "train:nodes=2")
    wait_until(lambda: steps_done(driver) >= 8, 60, "training")
    cluster.take_nodes(1, seconds=5)
    driver.succeeds(150)
    curve, repeated = read(driver.folder / "state/train")
    assert curve == undisturbed(40)
    assert repeated == 0
    first, second = driver.attempts("train")
    assert (first["state"], first["restart"], second["state"], second["restart"]) == ("PREEMPTED", 0, "COMPLETED", 1)
    assert first["job_id"] == second["job_id"]
    assert_agrees_with_sacct(driver, cluster)


@pytest.mark.slow
def test_walltime_reached_three_times(run, cluster):
    driver = run(training(1000, gpus=1, pace=0.15), resources=("runtime=1",))
    driver.succeeds(480)
    curve, repeated = read(driver.folder / "state/train")
    assert curve == undisturbed(1000)
    assert repeated == 0
    attempts = driver.attempts("train")
    assert len(attempts) >= 4
    assert {record["attempt"] for record in attempts} == {1}
    assert_agrees_with_sacct(driver, cluster)


def test_walltime_without_progress_fails(run, cluster):
    driver = run(
        'rule stuck:\n    output: "out/stuck"\n    log: "log/stuck.log"\n'
        '    shell: "echo stuck  step 0/5 > {log}; sleep 600; touch {output}"\n',
        "--retries",
        "3",
        resources=("runtime=1",),
    )
    assert driver.wait(200) != 0
    assert "walltime reached without progress: raise resources.runtime" in driver.log
    assert [record["state"] for record in driver.attempts()] == ["TIMEOUT"]


def test_node_set_down_loses_at_most_a_checkpoint_interval(run, cluster):
    driver = run(training(40, gpus=4))
    wait_until(lambda: steps_done(driver) >= 12, 60, "training past a checkpoint")
    node = cluster.call("squeue", "-h", "-j", driver.job_id("train"), "-o", "%N")
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    driver.succeeds(150)
    curve, repeated = read(driver.folder / "state/train")
    assert curve == undisturbed(40)
    assert repeated <= 10  # a checkpoint every 10 steps
    attempts = driver.attempts("train")
    assert attempts[0]["state"] == "NODE_FAIL"
    assert attempts[-1]["state"] == "COMPLETED"
    assert_agrees_with_sacct(driver, cluster)


def test_two_live_writers_cannot_both_save(run, cluster):
    """A node that loses only its slurmd goes on training while SLURM starts the job elsewhere."""
    driver = run(training(160, gpus=4))
    wait_until(lambda: steps_done(driver) >= 5, 60, "training")
    job = driver.job_id("train")
    node = cluster.call("squeue", "-h", "-j", job, "-o", "%N")
    os.kill(cluster.pid(f"slurmd-{node}"), signal.SIGKILL)
    driver.succeeds(240)
    folder = next(path for path in (driver.folder / "results/jobs").glob("train-*"))
    old = (folder / "status-0.json").read_text()
    assert '"kind": "stale"' in old, old
    rows = [line.split() for line in (driver.folder / "state/train/curve").read_text().splitlines()]
    second = [index for index, row in enumerate(rows) if row[2] == "1"]
    late = [row for row in rows[second[0] :] if row[2] == "0"]
    assert len(late) * 0.5 <= 20, "the old attempt trained on after the new one had started"
    assert {int(row[0]): float(row[1]) for row in rows if row[2] == "1"}[160] == undisturbed(160)[160]


def test_finished_and_requeued_does_not_run_again(run, cluster):
    """Requeued just after its command had succeeded, a job must not remove the outputs that others read by now."""
    driver = run(
        'rule once:\n    output: "out/once"\n    log: "log/once.log"\n    shell: "date +%s.%N > {output}; echo ran >> count"\n'
        'rule reader:\n    input: "out/once"\n    output: "out/read"\n    shell: "sleep 12; cp {input} {output}"\n',
        "out/read",
    )
    wait_until(lambda: driver.state("reader") == "RUNNING", 60, "the reader")
    cluster.call("scontrol", "requeue", driver.job_id("once"), check=False)
    driver.succeeds(90)
    time.sleep(8)
    assert (driver.folder / "count").read_text().split() == ["ran"]


def test_finished_in_the_grace_time_of_a_preemption_does_not_run_again(run, cluster):
    """Snakemake itself ends with 1 after any SIGTERM, whatever its rule did: the job would fail and be queued again."""
    driver = run(
        'rule once:\n    output: "out/once"\n    log: "log/once.log"\n    resources: gpu=4\n'
        "    shell: \"echo ran >> count; trap 'touch asked' TERM; touch started; "
        'while ! [ -e asked ]; do sleep 0.2 || true; done; sleep 2 || true; date > {output}"\n',
    )
    wait_until(lambda: (driver.folder / "started").exists(), 60, "the rule")
    cluster.take_nodes(2, seconds=2)
    driver.succeeds(120)
    assert (driver.folder / "asked").exists()
    assert (driver.folder / "count").read_text().split() == ["ran"]
    assert [record["exit_code"] for record in driver.attempts("once")] == [0]
    assert_agrees_with_sacct(driver, cluster)


def test_a_two_node_training_starts_all_ranks(run, cluster):
    pytest.importorskip("torch")
    driver = run(
        'rule ranks:\n    output: "out/ranks"\n    log: "log/ranks.log"\n    resources: nodes=2, gpu=4, mem_mb=3000\n    threads: 2\n'
        '    shell: "python -m snakemake_executor_plugin_submitit.launch --gpus 4 python ranks.py {output} > {log} 2>&1"\n',
    )
    (driver.folder / "ranks.py").write_text(RANKS)
    driver.succeeds(180)
    assert (driver.folder / "out/ranks").read_text().split() == ["4", "10.0"]


RANKS = """
import sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", dist.get_world_size(), flush=True)
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(f"{dist.get_world_size()} {total.item()}")
dist.destroy_process_group()
"""


def test_a_two_node_training_saves_on_every_rank_at_a_preemption(run, cluster):
    """SIGTERM reaches all ranks, they agree on the step, save, and the requeued job goes on from it."""
    pytest.importorskip("torch")
    driver = run(
        'rule ranks:\n    output: "out/ranks"\n    log: "log/ranks.log"\n    resources: nodes=2, gpu=4, mem_mb=3000\n    threads: 2\n'
        '    shell: "python -m snakemake_executor_plugin_submitit.launch --gpus 4 python steps.py 40 {output} > {log} 2>&1"\n',
    )
    (driver.folder / "steps.py").write_text(STEPS)
    log = driver.folder / "log/ranks.log"
    wait_until(lambda: log.exists() and "step 5/" in log.read_text(), 90, "training")
    cluster.take_nodes(1, seconds=2)
    driver.succeeds(200)
    steps = [int(line) for line in (driver.folder / "steps").read_text().split()]
    assert steps == list(range(1, 41))
    assert [record["state"] for record in driver.attempts("ranks")] == ["PREEMPTED", "COMPLETED"]
    assert [record["exit_code"] for record in driver.attempts("ranks")] == [85, 0]


STEPS = """
import os, signal, sys, time
import torch, torch.distributed as dist
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: asked.append(1))
dist.init_process_group("gloo")
rank, steps = dist.get_rank(), int(sys.argv[1])
step = int(open("checkpoint").read()) if os.path.exists("checkpoint") else 0
while step < steps:
    time.sleep(0.3)
    step += 1
    flag = torch.tensor([float(bool(asked))])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if rank == 0:
        open("steps", "a").write(f"{step}\\n")
        print(f"ranks  step {step}/{steps}", flush=True)
    if flag.item():
        if rank == 0:
            open("checkpoint.new", "w").write(str(step))
            os.replace("checkpoint.new", "checkpoint")
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(85)
if rank == 0:
    open(sys.argv[2], "w").write(str(step))
dist.barrier()
dist.destroy_process_group()
"""

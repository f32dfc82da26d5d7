"""The launcher: exec for one rank, torchrun for several, the exit code of the rank that failed first."""

import os
import signal
import subprocess
import sys
import time

import pytest
from snakemake_executor_plugin_submitit import launch

LAUNCH = [sys.executable, "-m", "snakemake_executor_plugin_submitit.launch"]
RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: asked.append(1))
open(f"rank-{rank}", "w").write(os.environ["WORLD_SIZE"])
mode = sys.argv[1]
if mode == "wait":
    while not asked:
        time.sleep(0.05)
    time.sleep(1 + rank)
    open(f"saved-{rank}", "w").close()
    time.sleep(0 if rank else 1.5)
    sys.exit(85)
sys.exit(int(mode) if rank == 1 else 0)
"""


def clean(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    return kept | more


def test_one_rank_replaces_the_launcher(tmp_path):
    process = subprocess.Popen(
        [*LAUNCH, "sh", "-c", "echo $$; exit 86"], stdout=subprocess.PIPE, text=True, env=clean()
    )
    assert process.communicate(timeout=30)[0].strip() == str(process.pid)
    assert process.returncode == 86


def test_gpus_that_are_missing_are_named():
    done = subprocess.run(
        [*LAUNCH, "--gpus", "8", "true"], env=clean(CUDA_VISIBLE_DEVICES="0,1"), capture_output=True, text=True
    )
    assert done.returncode == 78
    assert "--gpus 8: this node shows 2 GPUs, 8 are needed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("codes", "said"),
    [([1, 86], 86), ([86, 1], 86), ([-15, 1], 143), ([1, -6], 1), ([-6, 88, 86], 88), ([85, 85], 85)],
)
def test_an_exit_code_that_says_why_counts_before_one_of_a_rank_that_lost_its_peer(codes, said):
    assert launch.telling(codes) == said


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ("exit 0", "exit 0", 0),
        ("sleep 1; exit 1", "exit 86", 86),
        ("exit 1", "sleep 1.5; exit 86", 86),
        ("exit 7", "sleep 1; exit 1", 7),
        ("exit 85", "exit 85", 85),
        ("sleep 9", "exit 3", 3),
    ],
)
def test_of_several_nodes_the_one_that_says_why_counts(tmp_path, monkeypatch, here, there, said):
    """`there` stands for the job that waits on the second node, and writes down how its ranks ended."""
    monkeypatch.setattr(launch, "PEERS_SECONDS", 3.0)
    plan = tmp_path / "ranks-0.json"
    (tmp_path / "there.sh").write_text(
        f"({there}); echo $? > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/ranks-0-node-1"
    )
    second = subprocess.Popen(["sh", tmp_path / "there.sh"])
    assert launch._with_helpers(2, ["sh", "-c", here], plan) == said
    second.wait()


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 86])
def test_several_gpus_start_a_rank_each(tmp_path, code):
    pytest.importorskip("torch")
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [*LAUNCH, "--gpus", "2", sys.executable, "rank.py", str(code)],
        cwd=tmp_path,
        env=clean(CUDA_VISIBLE_DEVICES="0,1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["2", "2"]


@pytest.mark.parametrize(("cpus", "ranks", "threads"), [(16, 4, "4"), (2, 4, "1")])
def test_the_ranks_share_the_cpus_of_the_allocation(monkeypatch, cpus, ranks, threads):
    torchrun = pytest.importorskip("torch.distributed.run")
    given = []
    monkeypatch.setattr(torchrun, "run", lambda _: given.append(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", clean())
    os.environ.pop("OMP_NUM_THREADS", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert launch._torchrun(ranks, 1, ["true"]) == 0
    assert given == [threads]


@pytest.mark.slow
def test_ranks_decide_about_sigterm_themselves(tmp_path):
    """SLURM signals every process of a job; torchrun must not end ranks that save."""
    pytest.importorskip("torch")
    import psutil

    (tmp_path / "rank.py").write_text(RANK)
    process = subprocess.Popen(
        [*LAUNCH, "--ranks-per-node", "2", sys.executable, "rank.py", "wait"], cwd=tmp_path, env=clean()
    )
    end = time.time() + 90
    while not (tmp_path / "rank-1").exists() or not (tmp_path / "rank-0").exists():
        assert time.time() < end
        time.sleep(0.1)
    time.sleep(0.3)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()

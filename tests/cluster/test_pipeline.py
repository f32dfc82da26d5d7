"""The whole pipeline, tiny, through profiles/artemis on two nodes, with GPU and CPU partitions."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lab import MEASURED, ROOT, recoveries, wait_until
from snakemake_executor_plugin_submitit import ledger

pytest.importorskip("torch")

TINY = """\
corpus: {source: bundled, max_bytes: 600000, validation_fraction: 0.05, shard_bytes: 300000}
tokenizer: {vocab_size: 512}
model: {depth: 2, width: 64, head_dim: 32}
train:
  base: {gpus: 0, sequence_length: 64, tokens_per_step: 1024, steps: 60, validate_every_steps: 30, validation_tokens: 2048,
         checkpoint_every_seconds: 1.0}
  mid: {gpus: 0, sequence_length: 256, tokens_per_step: 2048, validation_tokens: 2048,
        mixture: [{name: chatterbot, conversations: 60}, {name: arithmetic, conversations: 30}]}
  sft: {gpus: 0, sequence_length: 256, tokens_per_step: 2048, validation_tokens: 2048,
        mixture: [{name: chatterbot, conversations: 40}, {name: identity, conversations: 10}]}
batch_size: {cache: "", max_device_batch_size: 16}
evaluate: {gpus: 0, items: 4, humaneval_problems: 1, humaneval_tokens: 8, validation_tokens: 4096, sample_tokens: 8}
benchmark: {gpus: 0, steps: 2, batch_sizes: [1], prompt_tokens: 8, new_tokens: 8}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository whose profile asks for what this cluster's small nodes have."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    profile = folder / "profiles/artemis/config.yaml"
    text = re.sub(r"mem_mb: \d+", "mem_mb: 2500", profile.read_text())
    text = re.sub(r"(?m)^(  \w+): (16|32)$", r"\1: 4", text)
    # The fake GPUs are asked for, held and accounted, and the stages train on the CPU all the same.
    text = text.replace("    gpu_model: a100\n", "    gpu_model: a100\n    gpu: 1\n")
    profile.write_text(text + "configfile: tiny.yaml\n")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def start(cluster, checkout: Path, *targets: str) -> subprocess.Popen:
    environment = cluster.environment | {"PYTHONPATH": f"{checkout}:{checkout / 'slurm'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/artemis"]
    command += ["--submitit-poll-seconds", "2", "--latency-wait", "20", *targets]
    with open(checkout / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=output)


def finish(driver: subprocess.Popen, checkout: Path, seconds: float) -> None:
    try:
        wait_until(lambda: driver.poll() is not None, seconds, "the end of the run", pause=1)
    finally:
        if driver.poll() is None:
            driver.send_signal(signal.SIGINT)
            driver.wait(60)
    assert driver.returncode == 0, (checkout / "output.txt").read_text()[-8000:]


def losses(checkout: Path) -> dict[int, float]:
    """Training loss by step, as the stage wrote it down."""
    rows = map(json.loads, (checkout / "results/base/log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_the_whole_pipeline_on_two_nodes(cluster, checkout):
    finish(start(cluster, checkout), checkout, 900)
    assert (checkout / "results/report.md").stat().st_size > 1000
    attempts = ledger.read_attempts(checkout / "results/jobs/ledger.jsonl")
    assert {record["state"] for record in attempts} == {"COMPLETED"}
    partitions = {record["rule"]: record["partition"] for record in attempts}
    assert partitions["base"] == "gpu"
    assert partitions["tokens"] == "general"
    assert all(record["gpus"] == 0 for record in attempts if record["partition"] == "general")
    assert all(record["gpu_type"] == "a100" for record in attempts if record["gpus"])


@pytest.mark.slow
def test_a_training_on_two_nodes_that_is_preempted_has_the_curve_of_an_undisturbed_one(cluster, checkout, request):
    """A rank on each node: both are told to stop, agree on the step, and go on from it together."""
    (checkout / "tiny.yaml").write_text(
        TINY.replace("steps: 60", "steps: 400").replace("gpus: 0", "gpus: 0, nodes: 2", 1)
    )
    profile = checkout / "profiles/artemis/config.yaml"
    profile.write_text(re.sub(r"(  base:\n(?:    .*\n)*?    gpu): 1", r"\1: 2", profile.read_text()))
    finish(start(cluster, checkout, "base"), checkout, 400)
    undisturbed = losses(checkout)
    shutil.rmtree(checkout / "results/base")
    driver = start(cluster, checkout, "base")
    log = checkout / "results/base/log.jsonl"
    wait_until(lambda: log.exists() and len(losses(checkout)) > 20, 120, "training")
    cluster.take_nodes(2, seconds=3)
    finish(driver, checkout, 400)
    base = [r for r in ledger.read_attempts(checkout / "results/jobs/ledger.jsonl") if r["rule"] == "base"]
    assert [record["state"] for record in base[-2:]] == ["PREEMPTED", "COMPLETED"]
    assert base[-2]["exit_code"] == 85
    assert all(len(record["node_names"]) == 2 for record in base[-3:])  # the run before this test's was on one
    assert "2 x" in (checkout / "results/base/base.log").read_text()
    assert losses(checkout) == undisturbed
    MEASURED.extend((request.node.name, line) for line in recoveries(base[-2:]))

"""Several real ranks over gloo: the same mathematics as one, and state that moves between numbers of ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training_support import (
    VOCAB,
    PlainLoader,
    files_equal,
    finish,
    losses,
    make_trainer,
    metrics,
    start_base,
    write_run,
)

from nanochat import hardware
from nanochat.files import read_json, write_json
from nanochat.train.distributed import World
from nanochat.train.trainer import Trainer

STEPS = 9


class Stops(Trainer):
    """Told to stop during its last rank's step `stop_at`: all must agree."""

    stop_at = STEPS

    def _step(self, save_due):
        if self.step + 1 == self.stop_at and self.world.rank == self.world.size - 1:
            self.stop.received = signal.SIGTERM
        return super()._step(save_due)


def train(folder: Path, ranks: int, until: int = STEPS, **options) -> None:
    """Go on with the run in `folder` on so many ranks, until so many steps are done."""
    if ranks == 1:
        _train(0, 1, folder, until, options)
        return
    meeting = folder / f"meeting-{ranks}-{until}"
    torch.multiprocessing.spawn(_join, (ranks, meeting, folder, until, options), nprocs=ranks)


def _join(rank: int, size: int, meeting: Path, *arguments) -> None:
    meeting.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    _train(rank, size, *arguments)
    dist.destroy_process_group()


def _train(rank: int, size: int, folder: Path, until: int, options: dict) -> None:
    hidden = options.pop("hidden", 0.0)
    if shares := options.pop("utilization", None):
        hardware.GpuUtilization.__enter__ = lambda self: vars(self).update(total=4 * shares[rank], samples=4) or self
    kind = type("StopsThere", (Stops,), {"stop_at": until})
    trainer = make_trainer(
        folder,
        steps=STEPS,
        loader=PlainLoader(hidden=hidden),
        micro_rows=2,
        world=World(rank, size, torch.device("cpu")),
        kind=kind,
        **options,
    )
    trainer.run()
    assert trainer.step == until


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(folder, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2, 1), (2, 4), (4, 2)])
def test_a_run_moves_between_numbers_of_ranks(tmp_path, alone, ranks):
    """67 rows of the embedding and 2 matrices of a shape divide by neither 2 nor 4."""
    assert VOCAB % 2
    for i, size in enumerate(ranks):
        train(tmp_path, size, until=STEPS * (i + 1) // len(ranks))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=2e-4)
    last = f"checkpoints/step-{STEPS:08}/"
    moved, straight = (load_file(folder / last / "optimizer.safetensors") for folder in (tmp_path, alone))
    assert moved.keys() == straight.keys()
    for name in straight.keys() - {"rng.cpu"}:
        difference = (moved[name] - straight[name]).norm() / straight[name].norm()
        assert difference < 0.02, name


@pytest.mark.slow
def test_resume_on_two_ranks_is_bitwise(tmp_path):
    train(tmp_path / "a", 2)
    train(tmp_path / "b", 2, until=4)
    train(tmp_path / "b", 2)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name in ("model", "optimizer"):
        last = f"checkpoints/step-{STEPS:08}/{name}.safetensors"
        assert files_equal(tmp_path / "a" / last, tmp_path / "b" / last)


@pytest.mark.slow
def test_utilization_is_of_all_gpus(tmp_path):
    train(tmp_path, 2, until=4, utilization=(0.9, 0.5))
    train(tmp_path, 2, utilization=(0.8, 0.2))
    history = read_json(tmp_path / f"checkpoints/step-{STEPS:08}/state.json")["history"]
    assert (history["gpu_utilization"], history["gpu_utilization_samples"]) == (pytest.approx(0.6), 16)


@pytest.mark.slow
def test_ranks_whose_rows_hold_few_targets_or_none_weigh_as_much_as_they_hold(tmp_path):
    for ranks in (1, 2):
        train(tmp_path / str(ranks), ranks, hidden=0.7)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=2e-4)


# There is no GPU to fill: on one rank the model says that it was.
SHORT_OF_MEMORY = """
import os, sys, torch
from nanochat import cli
from nanochat.model.gpt import GPT
plain = GPT.forward
asked = 0
def forward(*arguments, **options):
    global asked
    asked += 1
    if os.environ["RANK"] == "1" and asked == 40:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return plain(*arguments, **options)
GPT.forward = forward
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all_and_the_run_goes_on_with_fewer_rows(tmp_path):
    launcher = ("-m", "snakemake_executor_plugin_submitit.launch", "--ranks-per-node=2")
    straight = write_run(tmp_path / "a", steps=40)
    assert finish(start_base(straight))[0] == 0
    arguments = write_run(tmp_path / "b", steps=40, checkpoint_every_seconds=0.0)
    write_json(tmp_path / "b/plan.json", read_json(tmp_path / "b/plan.json") | {"grad_accum_steps": 1})
    program = tmp_path / "short_of_memory.py"
    program.write_text(SHORT_OF_MEMORY)
    flat = [part for pair in arguments.items() for part in pair]
    code, output = run([sys.executable, *launcher, sys.executable, str(program), "base", *flat], timeout=60)
    assert code == 86, output
    assert "out of GPU memory: CUDA out of memory" in output
    saved = max(path.name for path in Path(arguments["--checkpoints"]).glob("step-*"))
    plan = read_json(tmp_path / "b/plan.json")
    write_json(tmp_path / "b/plan.json", plan | {"device_batch_size": 2, "grad_accum_steps": 2})
    code, output = run([sys.executable, *launcher, sys.executable, "-m", "nanochat", "base", *flat], timeout=120)
    assert code == 0, output
    assert f"going on from {arguments['--checkpoints']}/{saved}" in output
    assert metrics(arguments)["tokens"] == metrics(straight)["tokens"]
    assert losses(tmp_path / "b/base") == pytest.approx(losses(tmp_path / "a/base"), rel=2e-3)


@pytest.mark.slow
def test_a_checkpoint_that_rank_0_cannot_write_ends_all_ranks(tmp_path):
    arguments = write_run(tmp_path, steps=5_000, checkpoint_every_seconds=0.0)
    Path(arguments["--out"]).mkdir()
    Path(arguments["--checkpoints"]).write_text("in the way")
    launcher = ("-m", "snakemake_executor_plugin_submitit.launch", "--ranks-per-node=2")
    flat = [part for pair in arguments.items() for part in pair]
    code, output = run([sys.executable, *launcher, sys.executable, "-m", "nanochat", "base", *flat], timeout=60)
    assert code == 1, output
    assert "while the checkpoint of step" in output


def run(command: list[str], timeout: float) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)
    return finish(process, timeout)

"""Resuming is exact on a GPU too, where algorithms are deterministic."""

import os
import signal

import pytest
import torch
import training_support
from training_support import ROWS, files_equal, losses, make_trainer, weights_equal

from nanochat import config
from nanochat.train.distributed import World
from nanochat.train.trainer import Trainer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class StopsAtFive(Trainer):
    def _step(self, save_due):
        if self.step == 4:
            self.stop.received = signal.SIGTERM
        return super()._step(save_due)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_resume_is_bitwise(tmp_path, monkeypatch, deterministic, compile):
    """12 steps in one go against 5, a resume and 7; bfloat16, two micro-steps a step, all kernels."""
    monkeypatch.setattr(training_support, "MODEL", config.Model(depth=4, width=256, head_dim=64))
    options = {"world": World(0, 1, torch.device("cuda", 0)), "dtype": "bfloat16", "compile": compile}
    options |= {"gpus": 1, "micro_rows": ROWS // 2}
    straight = make_trainer(tmp_path / "a", **options)
    assert straight.run()
    assert not make_trainer(tmp_path / "b", kind=StopsAtFive, **options).run()
    torch.compiler.reset()  # a new process compiles anew
    resumed = make_trainer(tmp_path / "b", seed=99, **options)
    assert resumed.run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert weights_equal(resumed.model, straight.model)
    last = "checkpoints/step-00000012/optimizer.safetensors"
    assert files_equal(tmp_path / "a" / last, tmp_path / "b" / last)

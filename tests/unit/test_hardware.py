"""Peaks, FLOPs and memory limits."""

import pytest
import torch

from nanochat import hardware
from nanochat.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD EPYC, 2 cores", None),
    ],
)
def test_peak_follows_the_name(name, peak):
    assert hardware.peak_flops(name, torch.bfloat16) == peak


def test_flops_of_a_token():
    # 12 layers of 768: 85M in the blocks, 32,768 x 768 in the head, full attention over 2,048 positions.
    matrices = 12 * 12 * 768**2 + 32_768 * 768
    assert hardware.flops_per_token(matrices, 12, 768, 2048) == 6 * matrices + 12 * 12 * 768 * 2048


def test_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert hardware.pick_device(None) == hardware.pick_device(0) == CPU
    with pytest.raises(UserError, match="gpus = 2"):
        hardware.pick_device(2)


def test_slurm_memory_limit_counts(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert hardware.memory_capacity_bytes(CPU) == 100 * 2**20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "50")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert hardware.memory_capacity_bytes(CPU) == 150 * 2**20


def test_peak_memory_sees_what_was_used():
    hardware.reset_peak_memory(CPU)
    before = hardware.peak_memory_bytes(CPU)
    block = torch.ones(64 * 2**20)
    assert hardware.peak_memory_bytes(CPU) > before + 200 * 2**20
    del block


def test_dtype_is_what_was_asked_for():
    assert hardware.resolve_dtype("float32", CPU) == torch.float32
    assert hardware.resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert hardware.resolve_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_utilisation_is_unknown_on_a_cpu():
    with hardware.GpuUtilization(CPU) as utilization:
        pass
    assert utilization.mean is None

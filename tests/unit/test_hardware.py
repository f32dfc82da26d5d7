"""Peaks, FLOPs and memory limits."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat import config, hardware
from nanochat.errors import UserError
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train import probe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
        ("AMD EPYC, 2 cores", None),
    ],
)
def test_peak_follows_the_name(name, peak):
    assert hardware.peak_flops(name, torch.bfloat16) == peak


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": 1000, "memory.current": 900, "memory.stat": "anon 250\nfile 650\ninactive_file 600"}, 700),
        ({"memory.max": 1000, "memory.current": 900}, 100),
        ({"memory.max": "max", "memory.current": 900}, 10_000 * 1024),
        (
            {
                "memory.limit_in_bytes": 1000,
                "memory.usage_in_bytes": 900,
                "memory.stat": "inactive_file 1\ntotal_inactive_file 600",
            },
            700,
        ),
    ],
)
def test_files_that_were_read_leave_their_memory_to_the_job(tmp_path, monkeypatch, files, free):
    """A cgroup counts them as used, and one that has read a corpus stands near its limit."""
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(hardware, "_cgroup_folders", lambda: [tmp_path])
    lines = hardware._lines
    monkeypatch.setattr(
        hardware, "_lines", lambda path: ["MemAvailable: 10000 kB"] if path == "/proc/meminfo" else lines(path)
    )
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.host_memory_bytes() == free


@pytest.mark.parametrize(
    ("error", "gpu", "host"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("shapes cannot be multiplied"), False, False),
        (ValueError("out of memory"), False, False),
    ],
)
def test_what_a_lack_of_memory_looks_like(error, gpu, host):
    assert (hardware.is_out_of_gpu_memory(error), probe.is_out_of_host_memory(error)) == (gpu, host)


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


SHAPES = [config.Model(depth=3, width=64, heads=4, kv_heads=kv_heads).resolved() for kv_heads in (4, 2, 1)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_parameters_are_counted_from_the_sizes(sizes):
    model = GPT(GPTConfig.from_settings(sizes, 101, 16))
    counted = {name: p.numel() for name, p in model.named_parameters() if "gate" not in name and "smear" not in name}
    assert hardware.parameter_count(sizes, 101) == sum(counted.values())
    embeddings = sum(count for name, count in counted.items() if name.endswith("embedding"))
    assert hardware.embedding_parameters(sizes, 101) == embeddings
    assert sum(p.numel() for p in model.parameters()) - sum(counted.values()) < 24 + 1 + 12 * 3 * sizes.heads


@pytest.mark.parametrize("sizes", SHAPES)
@given(length=st.integers(1, 4096), memory_bytes=st.integers(0, 10**10))
@example(length=326, memory_bytes=4_234_446)  # as many rows as are prefilled side by side, and one more
def test_decode_rows_are_the_most_that_fit(sizes, length, memory_bytes):
    rows = hardware.decode_rows(sizes, 101, length, 2, memory_bytes)
    assert rows == 0 or hardware.decode_bytes(sizes, 101, rows, length, 2) <= memory_bytes
    assert hardware.decode_bytes(sizes, 101, rows + 1, length, 2) > memory_bytes


@pytest.mark.parametrize("sizes", SHAPES)
def test_a_cache_takes_what_the_formula_says(sizes):
    cache = KVCache(GPTConfig.from_settings(sizes, 101, 16), 5, 48, CPU, torch.bfloat16)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in cache.tensors())
    assert stored == 5 * hardware.kv_cache_bytes(sizes, 48, 2)


@pytest.mark.parametrize(
    ("shown", "uuids"),
    [(None, ["GPU-a", "GPU-b"]), ("1", ["GPU-b"]), ("GPU-b,0", ["GPU-b", "GPU-a"]), ("", []), ("7", [])],
)
def test_visible_gpus_are_those_that_cuda_would_show(monkeypatch, shown, uuids):
    """Against a stand-in for NVML: two GPUs of different size."""
    handles = ["GPU-a", "GPU-b"]
    memory = {"GPU-a": SimpleNamespace(total=80, reserved=1), "GPU-b": SimpleNamespace(total=40, reserved=1)}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlMemory_v2=2,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handles.__getitem__,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: f"name of {handle}",
        nvmlDeviceGetMemoryInfo=lambda handle, version: memory[handle],
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(hardware, "_gpus_that_torch_sees", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = hardware.visible_gpus()
    assert [gpu.uuid for gpu in found] == uuids
    assert all(gpu.memory_bytes == memory[gpu.uuid].total - 1 for gpu in found)

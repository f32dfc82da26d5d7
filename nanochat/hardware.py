"""What a device is, has and can do: the one owner of peaks, FLOPs, memory sizes and utilisation.

It knows no model class: a model's cost follows from its sizes. torch is imported inside the functions, so that light
commands (report, workflow) may import this module.
"""

import bisect
import collections
import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from nanochat.errors import UserError

if TYPE_CHECKING:
    import torch

GIB = 2**30

# Dense peak in FLOP/s of matrix multiplications without sparsity, from the vendors' data sheets. The first whose words are
# words of the device's name counts, so the longer names come first: an A4000 is no A40. bfloat16 (float16 where there is no
# bfloat16), and float32 without TF32, which torch does not use unless told to. Slices of a GPU (MIG) have none.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2.5e15, 80e12),
    ("B200", 2.25e15, 80e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A30", 165e12, 10.3e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 6000 Ada", 364e12, 91.1e12),
    ("RTX A6000", 154.8e12, 38.7e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
)

PREFILL_ROWS = 32  # prompts computed side by side through a scratch cache, at most
MOST_PROMPTS = 128  # of a pass that needs none
PREFILL_TOKENS = 16_384  # of a pass on a GPU, at most
DRAWN_ROWS = 128  # of which tokens are drawn at once, at most
# By torch's allocator on an H100: activations of a token of a pass, in widths of the model, and what a draw takes beside its float32
# (R, V) logits, in copies of them: 9.25, most of it for the sort of top-p.
PREFILL_WIDTHS, DRAW_COPIES = 17, 10
LOGIT_COPIES = 2  # of all rows' logits in a decode step


class Sizes(Protocol):
    """Of a model. heads divides width, kv_heads divides heads."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    additions: Sequence[str]


@dataclass(frozen=True)
class Gpu:
    """A GPU as it can be known without using it. uuid is what CUDA_VISIBLE_DEVICES takes, too."""

    uuid: str
    name: str
    memory_bytes: int
    driver: str | None


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA would show to this process, asked without CUDA: its context would take half a GB of one.

    From NVML; where that does not answer, from torch in a process of its own.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        import pynvml

        pynvml.nvmlInit()
        if shown is None:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in shown.split(",") if name.strip()]
            handles = [
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(name)
                for name in names
            ]
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = []
        for handle in handles:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
            # What the driver keeps for itself is not there for CUDA.
            name, usable = pynvml.nvmlDeviceGetName(handle), memory.total - memory.reserved
            found.append(Gpu(pynvml.nvmlDeviceGetUUID(handle), name, usable, driver))
        return found
    except Exception:
        return _gpus_that_torch_sees() if Path("/dev/nvidiactl").exists() else []


def _gpus_that_torch_sees() -> list[Gpu]:
    code = (
        "import json, torch; n = torch.cuda.device_count(); p = [torch.cuda.get_device_properties(i) for i in range(n)];"
        "print(json.dumps([['GPU-' + str(x.uuid).removeprefix('GPU-'), x.name, x.total_memory, torch.version.cuda] for x in p]))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return [Gpu(*one) for one in json.loads(asked.stdout.splitlines()[-1])] if asked.returncode == 0 else []


def pick_device(gpus: int | None = None) -> "torch.device":
    """The device of this process: with `gpus` = 0 the CPU, otherwise CUDA device LOCAL_RANK.

    gpus  GPUs of the whole job; None takes a GPU if there is one. Raises UserError when a GPU is asked for and none is there.
    """
    import torch

    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise no_gpu(gpus)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"gpus = {gpus}: this process is number {local_rank} on the node, which shows {torch.cuda.device_count()} GPU(s)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def no_gpu(gpus: int | None) -> UserError:
    """What to say where GPUs are asked for and none is there."""
    return UserError(
        f"gpus = {gpus}: no usable CUDA device here. Ask for a GPU node, or set gpus: 0 to train on the CPU."
    )


def resolve_dtype(setting: Literal["auto", "bfloat16", "float32"], device: "torch.device") -> "torch.dtype":
    """The dtype of matrix multiplications. auto: bfloat16 where the hardware multiplies it, otherwise float32."""
    import torch

    if setting != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[setting]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())
    return torch.bfloat16 if fast else torch.float32


def device_name(device: "torch.device") -> str:
    """`NVIDIA H100 80GB HBM3`, or the CPU's model and cores."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    model = platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {cpu_count()} cores"


def cpu_count() -> int:
    """Cores that this process may use (a job's share, not the node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_flops(name: str, dtype: "torch.dtype | str") -> float | None:
    """Dense peak of the named device, FLOP/s; None where none is known (every CPU): no MFU is stated then."""
    for part, half, single in PEAKS:
        if re.search(rf"\b{part}\b(?!.*\bMIG\b)", name, re.IGNORECASE):
            return single if str(dtype).removeprefix("torch.") == "float32" else half
    return None


def flops_per_token(matmul_parameters: int, layers: int, width: int, sequence_length: int) -> float:
    """Forward and backward: 6 N + 12 L w T (Chowdhery et al. 2022, appendix B; attention over the full square, with windows too)."""
    return 6.0 * matmul_parameters + 12.0 * layers * width * sequence_length


def embedding_parameters(sizes: Sizes, vocab_size: int) -> int:
    """Of the token embedding, and of those that every second layer adds to its values."""
    own = (sizes.depth + 1) // 2 if "value_embeddings" in sizes.additions else 0
    return vocab_size * (sizes.width + own * sizes.kv_heads * (sizes.width // sizes.heads))


def parameter_count(sizes: Sizes, vocab_size: int) -> int:
    """Of a model without biases and gains: embeddings, untied head, fused projections, an MLP of 4 x width.

    The gates of `model.additions` are left out: some hundred numbers.
    """
    projections = 2 * sizes.width + 2 * sizes.kv_heads * (sizes.width // sizes.heads)
    matrices = vocab_size * sizes.width + sizes.depth * sizes.width * (projections + 8 * sizes.width)
    return embedding_parameters(sizes, vocab_size) + matrices


def kv_cache_bytes(sizes: Sizes, length: int, itemsize: int) -> int:
    """Keys and values of one row of `length` positions, with smear the token ids; itemsize is the cache's, in bytes."""
    ids = 8 if "smear" in sizes.additions else 0
    return length * (2 * sizes.depth * sizes.kv_heads * (sizes.width // sizes.heads) * itemsize + ids)


def decode_bytes(sizes: Sizes, vocab_size: int, rows: int, length: int, itemsize: int) -> int:
    """All that decoding allocates beside the weights: the cache (with a scratch and a shared prefix), a step's logits, and the more of
    what a prefill's activations and what its draw take."""
    caches = (rows + min(rows, PREFILL_ROWS) + 1) * kv_cache_bytes(sizes, length, itemsize)
    prefill = PREFILL_WIDTHS * itemsize * sizes.width * min(rows * length, PREFILL_TOKENS)
    logits, drawn = LOGIT_COPIES * rows + min(rows, MOST_PROMPTS), DRAW_COPIES * min(rows, DRAWN_ROWS)
    return caches + 4 * vocab_size * logits + max(prefill, 4 * vocab_size * drawn)


def decode_rows(sizes: Sizes, vocab_size: int, length: int, itemsize: int, memory_bytes: int) -> int:
    """The most rows whose `decode_bytes` are within that memory; 0 when not even one fits."""
    most = max(0, memory_bytes) // kv_cache_bytes(sizes, length, itemsize)
    return bisect.bisect_right(
        range(1, most + 1), memory_bytes, key=lambda rows: decode_bytes(sizes, vocab_size, rows, length, itemsize)
    )


def training_bytes(parameters: int, layers: int, width: int, tokens: int, itemsize: int, compiled: bool) -> float:
    """Roughly what a micro-batch of `tokens` takes to train: where a search begins.

    Weights, gradients and optimizer state in float32, and 14 activations a width, layer and token (measured: 13.5 to 13.9, 12 to 20
    layers, T = 512 to 2,048, on H100 and H200); 25 where nothing is compiled, a guess. itemsize is that of an activation, in bytes.
    """
    return 18.0 * parameters + (14.0 if compiled else 25.0) * itemsize * layers * width * tokens


def memory_capacity_bytes(device: "torch.device") -> int:
    """What this process can use: the GPU's memory; on a CPU the least of what is available, the cgroup's and SLURM's limit."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes()


def host_memory_bytes() -> int:
    """Memory that is available on this host to this job."""
    limits = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    for folder in _cgroup_folders():
        limit, used, cached = _number(folder / "memory.max"), _number(folder / "memory.current"), "inactive_file"
        if limit is None:  # version 1 of cgroups
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            cached = "total_inactive_file"
        if limit is not None and limit < 2**60:
            # Files that were read count as used until the memory is wanted for something else.
            stat = _lines(str(folder / "memory.stat"))
            free = sum(int(line.split()[1]) for line in stat if line.startswith(f"{cached} "))
            limits.append(min(limit, max(limit - (used or 0) + free, 0)))
    if mebibytes := os.environ.get("SLURM_MEM_PER_NODE"):
        limits.append(int(mebibytes) * 2**20)
    elif mebibytes := os.environ.get("SLURM_MEM_PER_CPU"):
        limits.append(int(mebibytes) * 2**20 * int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Also where it is not the caching allocator that finds no room but a library or the driver, cuBLAS for its workspace for one."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("ALLOC_FAILED", "out of memory"))


def used_beside_bytes(device: "torch.device") -> int:
    """Memory of a GPU in use but not by this process' caching allocator: context, libraries, other processes. 0 on a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def peak_memory_bytes(device: "torch.device") -> int:
    """Most memory since `reset_peak_memory`: of CUDA's allocator (reserved), or resident in this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: "torch.device") -> None:
    """Start the peak anew (on a CPU where the kernel lets us)."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # what the allocator keeps for later would count
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: "torch.device") -> None:
    """Wait for the device's queued work; nothing on a CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class GpuUtilization:
    """Utilisation, memory, clock and power of a GPU while the block runs, sampled through NVML by a thread.

    with GpuUtilization(device) as utilization: ...
    utilization.mean                   0 to 1; None on a CPU or where NVML does not answer
    utilization.most_used_bytes        of the whole device, all processes; None likewise
    utilization.clock_hz, power_watts  means, of the processors' clock and of the board; None likewise
    """

    def __init__(self, device: "torch.device", every_seconds: float = 0.5):
        self.device, self.every_seconds = device, every_seconds
        self.samples, self.total = 0, 0.0
        self.total_clock_hz, self.total_watts = 0.0, 0.0
        self.most_used_bytes: int | None = None
        self._newest: collections.deque[tuple[float, float]] = collections.deque(maxlen=1000)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def mean(self) -> float | None:
        return self.total / self.samples if self.samples else None

    @property
    def clock_hz(self) -> float | None:
        return self.total_clock_hz / self.samples if self.samples else None

    @property
    def power_watts(self) -> float | None:
        return self.total_watts / self.samples if self.samples else None

    def recent(self, seconds: float) -> float | None:
        """Mean utilisation of the last `seconds`."""
        newest = list(self._newest)
        shares = [share for when, share in newest if when >= newest[-1][0] - seconds]
        return sum(shares) / len(shares) if shares else None

    def __enter__(self) -> "GpuUtilization":
        if self.device.type == "cuda":
            self._thread = threading.Thread(target=self._sample, name="gpu-utilization", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _sample(self) -> None:
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            # CUDA's index counts the visible GPUs only, NVML's counts all: the UUID is the same in both.
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            while not self._stop.wait(self.every_seconds):
                share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                clock_mhz = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
                milliwatts = pynvml.nvmlDeviceGetPowerUsage(handle)
                self.total += share
                self.total_clock_hz += 1e6 * clock_mhz
                self.total_watts += milliwatts / 1000
                self.samples += 1
                self._newest.append((time.monotonic(), share))
                used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
                self.most_used_bytes = max(self.most_used_bytes or 0, used)
        except Exception:
            # A measurement must not end a run; without samples `mean` is None.
            return


def process_started_unix() -> float:
    """When this process began (unix seconds): start-up time includes the imports. Now, where /proc does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def _cpu_flags() -> set[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _cgroup_folders() -> list[Path]:
    """Folders of this process' memory cgroup and its parents; version 2 and 1."""
    folders = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup") if controllers == "" else Path("/sys/fs/cgroup/memory")
            folder = root / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return folders


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

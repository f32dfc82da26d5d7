"""Triton kernels where the tests run: on a GPU as they are, elsewhere in Triton's interpreter. Import it where triton is installed."""

import torch
import triton
import triton.language as tl

from nanochat.config import ADDITIONS
from nanochat.model.gpt import GPT, GPTConfig

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]  # numpy has no bfloat16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
PDL = {"PDL": 1, "launch_pdl": True} if ON_GPU and torch.cuda.get_device_capability() >= (9, 0) else {"PDL": 0}
CANARY = 7.0
VOCAB = 97


@triton.jit
def _count(out, n):
    for i in tl.range(0, tl.load(n)):
        tl.store(out, tl.zeros((), tl.int32) + i)


def interpreter_fails() -> str | None:
    """Why these tests cannot run. Triton's interpreter up to 3.6, for one, does not count to a loaded number with numpy 2.4."""
    if not ON_GPU and isinstance(_count, triton.JITFunction):
        return "triton was imported before this without TRITON_INTERPRET=1: run this file alone"
    try:
        _count[(1,)](torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE))
    except Exception as error:
        return f"triton's interpreter does not run here: {error}"
    return None


FAILS = interpreter_fails()


class Guarded:
    """A tensor with 64 canaries on either side."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 128,), CANARY, dtype=dtype, device=DEVICE)
        self.tensor = self.whole[64 : 64 + size].view(shape)
        self.tensor.fill_(float("nan") if dtype.is_floating_point else -1)

    def intact(self) -> bool:
        return bool((self.whole[:64] == CANARY).all() and (self.whole[-64:] == CANARY).all())


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within a tolerance relative to the whole tensor's size; NaN is never close."""
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    return bool(error < TOLERANCE[dtype])


def tiny(dtype: torch.dtype, kv_heads: int = 2, depth: int = 2, additions: tuple[str, ...] = ADDITIONS) -> GPT:
    """Width 64 in 4 heads of 16, random weights everywhere."""
    sizes = {"logit_softcap": 15.0, "rope_base": 10_000.0, "sequence_length": 160}
    model = GPT(GPTConfig(VOCAB, depth, 64, 4, kv_heads, **sizes, additions=additions))
    generator = torch.Generator().manual_seed(kv_heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name in ("embedding", "head") else 0.2
            parameter.copy_(torch.empty(parameter.shape).normal_(0, scale, generator=generator))
    model.compute_dtype = dtype
    return model.to(DEVICE).eval()

"""Softcapped cross-entropy on a GPU: the logits of a slice of the tokens exist once, in the products' dtype, and become their
own gradient in place.

For one token with logits z = s tanh(u / s), u = W x:  loss = log sum exp(z) - z[target],
d loss / du = (softmax(z) - onehot) (1 - (z / s)^2).  |z| <= s bounds exp(z), so no maximum needs to be subtracted.

One operation to the compiler: traced, it would be unrolled over the slices and its memory planned anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

# Of a slice's logits. Large, because each slice reads and writes the float32 gradient of the whole head once: with 65,536 tokens
# of width 768 and 32,768 entries an H100 takes 18.9 ms for loss and gradients, with half as much 19.6 ms.
SLICE_BYTES = 2**30
# A row of so many entries is read once and kept in registers, 1,024 a warp; a longer one is read twice, in blocks. 8,192 rows of
# 32,768 entries: 0.51 ms, in blocks 0.61 ms; to read and write them takes 0.37 ms. (The GPU's own approximate tanh would save
# 0.03 ms of that, and be the only part that is not exact in float32.)
LARGEST_ROW = 32_768
BLOCK, WARPS = 8192, 16


def slice_tokens(vocab_size: int, dtype: torch.dtype) -> int:
    """Tokens whose logits take `SLICE_BYTES`."""
    return max(64, SLICE_BYTES // (vocab_size * dtype.itemsize))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _whole_row(logits, targets, losses, vocab_size, softcap, BLOCK: tl.constexpr):
    """One token: its row of `logits`, of at most BLOCK entries, is replaced by its gradient."""
    token = tl.program_id(0).to(tl.int64)
    line = logits + token * vocab_size
    target = tl.load(targets + token)
    counts = target >= 0
    # Before the sum, whose barrier keeps any thread from writing the gradient before all have read this.
    at_target = _tanh(tl.load(line + tl.maximum(target, 0)).to(tl.float32) * (1.0 / softcap))
    columns = tl.arange(0, BLOCK)
    needed = columns < tl.where(counts, vocab_size, 0)
    capped = _tanh(tl.load(line + columns, mask=needed, other=0.0).to(tl.float32) * (1.0 / softcap))
    exps = tl.where(needed, tl.exp(softcap * capped), 0.0)
    # Multiplied here, so that one number an entry waits for the sum, not two.
    gradient = exps * (1.0 - capped * capped)
    total = tl.where(counts, tl.sum(exps), 1.0)
    tl.store(losses + token, tl.where(counts, tl.log(total) - softcap * at_target, 0.0))
    gradient = gradient * (1.0 / total) - tl.where(columns == target, 1.0 - at_target * at_target, 0.0)
    tl.store(line + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab_size)


@triton.jit
def _in_blocks(logits, targets, losses, vocab_size, softcap, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One token: a row of `logits`, read for the sum of exp, and again (from the cache) to be replaced by its gradient."""
    token = tl.program_id(0).to(tl.int64)
    line = logits + token * vocab_size
    target = tl.load(targets + token)
    counts = target >= 0
    # Before the sum, whose barrier keeps any thread from writing the gradient before all have read this.
    at_target = _tanh(tl.load(line + tl.maximum(target, 0)).to(tl.float32) * (1.0 / softcap))
    parts = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.where(counts, vocab_size, 0), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        logit = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
        parts += tl.where(inside, tl.exp(softcap * _tanh(logit * (1.0 / softcap))), 0.0)
    total = tl.where(counts, tl.sum(parts), 1.0)
    tl.store(losses + token, tl.where(counts, tl.log(total) - softcap * at_target, 0.0))
    if GRADIENT:
        scale = tl.where(counts, 1.0 / total, 0.0)
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            capped = _tanh(tl.load(line + columns, mask=inside, other=0.0).to(tl.float32) * (1.0 / softcap))
            gradient = tl.exp(softcap * capped) * scale - tl.where(columns == target, 1.0, 0.0)
            gradient *= 1.0 - capped * capped
            tl.store(line + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float, gradient: bool) -> None:
    """Fill `losses` (n,) float32; with `gradient` also replace the logits (n, V), before the softcap, by d losses / d logits.

    targets  (n,) int64; -1: neither loss nor gradient
    """
    assert all(tensor.is_contiguous() for tensor in (logits, targets, losses))
    count, vocab_size = logits.shape
    if not count:
        return
    if gradient and vocab_size <= LARGEST_ROW:
        block = triton.next_power_of_2(vocab_size)
        warps = min(32, max(1, block // 1024))
        _whole_row[(count,)](logits, targets, losses, vocab_size, softcap, BLOCK=block, num_warps=warps)
    else:
        _in_blocks[(count,)](
            logits, targets, losses, vocab_size, softcap, GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS
        )  # fmt: skip


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (a, b) float32 += left (a, n) @ right (n, b), summed in float32 whatever the factors' dtype."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@library.custom_op("nanochat::cross_entropy_sum", mutates_args=())
def cross_entropy_sum(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses and its gradients.

    x        (N, C)
    weight   (V, C), cast to x's dtype
    targets  (N,) int64, -1 carries no loss
    tokens   of a slice
    returns  () float32, (N, C) of x's dtype, (V, C) float32
    """
    x, targets, cast = x.contiguous(), targets.contiguous(), weight.to(x.dtype)
    losses = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    buffer = x.new_empty(min(tokens, x.size(0)), weight.size(0))
    for first in range(0, x.size(0), tokens):
        part = slice(first, first + tokens)
        logits = buffer[: len(x[part])]
        torch.mm(x[part], cast.T, out=logits)
        cross_entropy_(logits, targets[part], losses[part], softcap, gradient=True)
        torch.mm(logits, cast, out=grad_x[part])
        add_product_(grad_weight, logits.T, x[part])
    return losses.sum(), grad_x, grad_weight


@cross_entropy_sum.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((), dtype=torch.float32),
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, dtype=torch.float32),
    )


@library.custom_op("nanochat::cross_entropies", mutates_args=())
def cross_entropies(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, tokens: int) -> Tensor:
    """The losses (N,) float32, without gradients; arguments as of `cross_entropy_sum`."""
    x, targets, cast = x.contiguous(), targets.contiguous(), weight.to(x.dtype)
    losses = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    buffer = x.new_empty(min(tokens, x.size(0)), weight.size(0))
    for first in range(0, x.size(0), tokens):
        part = slice(first, first + tokens)
        logits = buffer[: len(x[part])]
        torch.mm(x[part], cast.T, out=logits)
        cross_entropy_(logits, targets[part], losses[part], softcap, gradient=False)
    return losses


@cross_entropies.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, tokens: int) -> Tensor:
    return x.new_empty(x.size(0), dtype=torch.float32)


class SummedLoss(torch.autograd.Function):
    """`cross_entropy_sum` with its gradients, which are there before they are asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        tokens = slice_tokens(weight.size(0), x.dtype)
        total, grad_x, grad_weight = cross_entropy_sum(x, weight, targets, softcap, tokens)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total.to(grad_x.dtype), (grad_weight * grad_total).to(ctx.weight_dtype), None, None

"""Cross-entropy of softcapped logits, a slice of the tokens at a time.

With 65,536 entries the float32 logits of 32 rows of 2,048 tokens are 17 GB. Here they exist only for `CHUNK_BYTES` worth of
tokens, forward and backward: the gradient is computed together with the loss, while a slice's logits are still there.
On a GPU with Triton fused_loss.py does the same in fewer passes over memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.kernels import HAS_TRITON, fused, tanh_

if HAS_TRITON:
    from nanochat.model import fused_loss

# On a CPU a slice should stay in the cache: the loss makes several passes over it (measured: 3x faster than 64 MB).
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose float32 logits take `CHUNK_BYTES`; at least 64, so that the matrix products stay efficient."""
    return max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """x (..., C), weight (V, C) -> softcap x tanh(logits / softcap), (..., V) float32."""
    scaled = F.linear(x, weight.to(x.dtype)).float() / softcap
    # In place only where no gradient needs what is overwritten.
    return softcap * torch.tanh(scaled) if scaled.requires_grad else tanh_(scaled).mul_(softcap)


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """-log p of each target in nats: x (N, C), targets (N,) -> (N,) float32, 0 where the target is -1. For evaluation."""
    if fused("loss", x):
        return fused_loss.cross_entropies(x, weight, targets, softcap, fused_loss.slice_tokens(weight.size(0), x.dtype))
    weight, losses = weight.to(x.dtype), []
    step = chunk_tokens(weight.size(0), x.device)
    for part, target in zip(x.split(step), targets.split(step), strict=True):
        logits = softcapped_logits(part, weight, softcap)
        losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction="none"))
    return torch.cat(losses)


def summed_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Sum of `token_losses`, a float32 scalar, without the logits of all tokens ever existing at once."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        by_hand = fused_loss.SummedLoss if fused("loss", x) else _SummedLoss
        return by_hand.apply(x, weight, targets, softcap)
    return token_losses(x, weight, targets, softcap).sum()


class _SummedLoss(torch.autograd.Function):
    """For one token with logits z = s tanh(u / s), u = W x:  d loss / du = (softmax(z) - onehot) (1 - (z / s)^2)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        cast = weight.to(x.dtype)
        # Nothing that is saved is written in place: a compiled graph of torch 2.11 saves it as it was before.
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grads_x = []
        step = chunk_tokens(weight.size(0), x.device)
        for part, target in zip(x.split(step), targets.split(step), strict=True):
            counts = target >= 0
            index = target.clamp_min(0)[:, None]
            capped = tanh_(F.linear(part, cast).float().div_(softcap))  # (n, V)
            # |logits| <= softcap, so exp needs no maximum subtracted, and one exp serves loss and gradient.
            grad = (capped * softcap).exp_()
            total_exp = grad.sum(-1)
            losses = total_exp.log() - softcap * capped.gather(-1, index)[:, 0]
            total = total + torch.where(counts, losses, 0.0).sum()
            grad *= (counts / total_exp)[:, None]
            grad.scatter_add_(-1, index, -counts[:, None].float())
            grad -= grad * capped.square_()
            grad = grad.to(x.dtype)
            grads_x.append(grad @ cast)
            grad_weight = grad_weight + grad.T @ part
        grad_x = torch.cat(grads_x)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total.to(grad_x.dtype), (grad_weight * grad_total).to(ctx.weight_dtype), None, None

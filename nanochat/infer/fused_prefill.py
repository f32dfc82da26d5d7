"""Whole prompts at once, captured: the counterpart of `fused_step` for the first pass.

Eagerly a pass over a short prompt takes the host far longer to launch than the GPU to run. Here prompts are padded to a few
shapes, each of which is captured at its second use: one that comes but once is not worth it. Padding stands behind a prompt,
where causal attention does not see it; keys and values go straight to the rows of the engine's cache.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.infer.decoder import Decoder, captured
from nanochat.model.additions import before
from nanochat.model.kernels import causal_attention, norm, seen
from nanochat.model.loss import softcapped_logits
from nanochat.transfer import send

RELU_BLOCK = 1024


def width_of(length: int, longest: int) -> int:
    """Tokens that prompts of up to `length` are padded to, at most `longest`: four sizes between a power of two and the next."""
    step = max(8, (1 << (length - 1).bit_length()) // 8)
    return min(-(-length // step) * step, longest)


def count_of(prompts: int, most: int) -> int:
    """Prompts that a pass of so many is filled up to, at most `most`: a power of two, from 16 on a multiple of 16."""
    return min(most, 1 << (prompts - 1).bit_length() if prompts <= 16 else -(-prompts // 16) * 16)


class FusedPrefill:
    """Computes prompts from their start into rows of the cache that a `FusedStep` decodes from."""

    def __init__(self, decoder: Decoder):
        """For the cache of this decoder; captured when its steps are."""
        from nanochat.infer import prefill_kernels

        self.kernels, self.step, self.logits, self.pool = prefill_kernels, decoder.fused, decoder.logits, decoder.pool
        self.seen: set[tuple[int, int]] = set()
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], slots: list[int], width: int) -> Tensor:
        """Last logits of the prompts (P, V) float32, in a buffer that the next pass overwrites.

        slots  where each prompt's keys and values go
        width  tokens that the prompts are padded to
        """
        count, graphs = len(prompts), self.pool is not None
        if graphs:
            count = count_of(count, len(self.logits))
        # A row of padding alone has no tokens to store; its logits are of nothing and read by nobody.
        empty = [[0] * width + [0, 0]] * (count - len(prompts))
        rows = [[*p, *[0] * (width - len(p)), len(p), slot] for p, slot in zip(prompts, slots, strict=True)] + empty
        said = torch.from_numpy(np.array(rows, dtype=np.int64))  # a quarter of the time that torch.tensor takes
        if not graphs or (count, width) not in self.seen:
            self._forward(said.to(self.logits.device))
            self.seen.add((count, width))
        else:
            if (count, width) not in self.captured:
                inputs = said.to(self.logits.device)
                self.captured[count, width] = captured(lambda: self._forward(inputs), self.pool)[0], inputs
            graph, inputs = self.captured[count, width]
            send(said, inputs)
            graph.replay()
        return self.logits[: len(prompts)]

    def _forward(self, inputs: Tensor) -> None:
        """inputs (P, T + 2) int64: tokens, the prompt's length, its slot."""
        step, config = self.step, self.step.config
        tokens, lengths, slots = inputs[:, :-2], inputs[:, -2], inputs[:, -1]
        count, width = tokens.shape
        heads, kv_heads, head_dim = config.heads, config.kv_heads, step.head_dim
        x = norm(F.embedding(tokens, step.embedding))  # (P, T, C)
        if step.smear is not None:
            x = step.smear(x, before(x))
            self._store(tokens, lengths, slots)
        x = x.view(count * width, -1)
        sizes = {"WIDTH": config.width, "BLOCK_WIDTH": 1 << (config.width - 1).bit_length()}
        for layer, embedding in enumerate(step.value_embeddings):
            qkv, out, up, down = step.weights[4 * layer : 4 * layer + 4]
            projected = F.linear(x, qkv)  # (P T, (H + 2 KV) D), norm's factor still to come
            turned = x.new_empty(count, width, heads + 2 * kv_heads, head_dim)
            self.kernels.turn[(width, count)](
                x,
                projected,
                turned,
                step.cache.keys[layer],
                step.cache.values[layer],
                step.cos,
                step.sin,
                slots,
                lengths,
                tokens,
                step.embedding if embedding is None else embedding,
                inputs.stride(0),
                width,
                step.cache.length,
                qkv.size(0),
                embedding is not None,
                heads,
                kv_heads,
                head_dim,
                1 << (heads + 2 * kv_heads - 1).bit_length(),
                **sizes,
            )
            queries, keys, values = turned.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)  # (P, H, T, D)
            window = step.windows[layer]
            if layer + 1 == config.depth:
                # Nothing needs what this layer makes of the tokens before the last.
                last = (lengths - 1).clamp_min(0)
                own = torch.arange(count, device=x.device)
                x, queries = x.view(count, width, -1)[own, last], queries[own, :, last].unsqueeze(2)
                mask = seen(last[:, None], torch.arange(width, device=x.device), window)[:, None, None]
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=mask, enable_gqa=heads != kv_heads
                )
            else:
                attended = causal_attention(queries, keys, values, window)
            x.addmm_(attended.transpose(1, 2).reshape(len(x), -1), out.T)  # out of place it would copy x first
            hidden = F.linear(x, up)
            self.kernels.squared_relu_[(len(x),)](hidden, x, hidden.size(1), RELU_BLOCK, **sizes)
            x.addmm_(hidden, down.T)
        self.logits[:count] = softcapped_logits(norm(x), step.weights[-1], config.logit_softcap)

    def _store(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> None:
        """Put the prompts' tokens (P, T) into the cache; padding changes nothing there."""
        width = tokens.size(1)
        kept = torch.arange(width, device=tokens.device) < lengths[:, None]
        # Rows of padding alone name a slot that may be another's: they add nothing to what is written there.
        rows = self.step.cache.tokens
        change = torch.where(kept, tokens - rows[slots, :width], 0)
        rows[:, :width].index_add_(0, slots, change)

"""Prefill: many prompts at once, each computed once however many rows will continue it.

They go through a scratch cache that is copied into the engine's rows. That costs a little bandwidth and buys that freed rows need
not be neighbours, that several samples share one prompt, and that a prefix shared by all prompts is computed a single time.
Where the kernels serve (`fused_prefill`), prompts without such a prefix go straight to their rows.
"""

import torch
from torch import Tensor

from nanochat.infer.capacity import MOST_PROMPTS
from nanochat.infer.fused_prefill import FusedPrefill, width_of
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT

SHORTEST_PREFIX = 16  # tokens; a shorter common prefix costs more to copy than to compute


def bucket(length: int, longest: int) -> int:
    """The smallest of 64, 128, 256, ... that holds `length` positions, at most `longest`."""
    size = 64
    while size < length:
        size *= 2
    return min(size, longest)


def common_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts share at their start; each keeps at least one of its own."""
    shortest, longest = min(prompts), max(prompts)  # in lexicographic order, so these two differ earliest
    limit = min(len(prompt) for prompt in prompts) - 1
    for i in range(limit):
        if shortest[i] != longest[i]:
            return i
    return limit


class Prefill:
    """Computes keys, values and last logits of prompts."""

    def __init__(self, model: GPT, cache: KVCache, rows: int, tokens: int, fused: FusedPrefill | None = None):
        """cache: of the engine; rows: of the scratch cache; tokens: in one pass at most, which bounds the activations."""
        self.model, self.cache, self.rows, self.length, self.tokens = model, cache, rows, cache.length, tokens
        self.fused = fused
        arguments = (self.length, model.device, model.compute_dtype)
        self.scratch = KVCache(model.config, rows, *arguments)
        self.shared = KVCache(model.config, 1, *arguments)
        self.prefix: list[int] = []

    @torch.no_grad()
    def share(self, prompts: list[list[int]]) -> None:
        """Compute the prefix that these prompts have in common, for all the prefills to come."""
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        self.prefix = []
        if shared >= SHORTEST_PREFIX:
            prefix = prompts[0][:shared]
            for first in range(0, shared, self.tokens):
                self._forward(self.shared, [prefix[first : first + self.tokens]], first)
            self.prefix = prefix

    def batches(self, prompts: list[list[int]]) -> list[list[int]]:
        """Which prompts (indices) go into one pass: similar lengths together, since all are as long as the longest."""
        result: list[list[int]] = []
        most, padded = (MOST_PROMPTS, width_of) if self.fused and not self.prefix else (self.rows, bucket)
        for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            width = padded(len(prompts[result[-1][0]]), self.length) if result else 0
            fits = result and len(result[-1]) < most and (len(result[-1]) + 1) * width <= self.tokens
            result[-1].append(index) if fits else result.append([index])
        return result

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], slots: list[list[int]]) -> Tensor:
        """Fill rows of the cache, `slots` of each prompt, with the prompts; returns their last logits (P, V) float32.

        The logits may be in a buffer that the next call overwrites.
        """
        longest = max(len(prompt) for prompt in prompts)
        if self.fused and not self.prefix and longest <= self.tokens:
            logits = self.fused(prompts, [some[0] for some in slots], width_of(longest, self.length))
            self._copy(self.cache, slots, [some[0] for some in slots], longest, skip=1)
            return logits
        logits = self._through_scratch(prompts, longest)
        self._copy(self.scratch, slots, list(range(len(prompts))), longest)
        return logits

    def _through_scratch(self, prompts: list[list[int]], longest: int) -> Tensor:
        """Fill the first rows of the scratch cache with these prompts; returns their last logits (P, V) float32."""
        start = len(self.prefix)
        if start:
            for scratch, shared in zip(self.scratch.tensors(), self.shared.tensors(), strict=True):
                scratch[: len(prompts), :start] = shared[:, :start]
        # A single long prompt goes in pieces, so that its activations stay bounded too.
        while len(prompts) == 1 and longest - start > self.tokens:
            self._forward(self.scratch, [prompts[0][start : start + self.tokens]], start)
            start += self.tokens
        return self._forward(self.scratch, [prompt[start:] for prompt in prompts], start)

    def _copy(self, source: KVCache, slots: list[list[int]], rows: list[int], length: int, skip: int = 0) -> None:
        """Copy the first `length` positions of each of the source's `rows` to all of its slots but the first `skip`."""
        pairs = [(slot, row) for some, row in zip(slots, rows, strict=True) for slot in some[skip:]]
        if pairs:
            self.cache.copy_rows(source, pairs, length)

    def extend(self, slot: int, tokens: list[int], start: int) -> Tensor:
        """Append tokens to one row of the cache from position `start`; returns the last logits (1, V) float32."""
        return self._forward(self.cache.sliced(first_row=slot, rows=1), [tokens], start)

    @torch.no_grad()
    def _forward(self, cache: KVCache, rows: list[list[int]], start: int) -> Tensor:
        """Rows of tokens that stand at start, start + 1, ...; last logits (P, V).

        A shorter row is filled up with its last token at its last position: it computes the same key there again, and the
        last column holds the last logits of all rows.
        """
        width = max(len(row) for row in rows)
        tokens = [row + [row[-1]] * (width - len(row)) for row in rows]
        positions = [[start + min(i, len(row) - 1) for i in range(width)] for row in rows]
        device = self.model.device
        some = cache.sliced(rows=len(rows), length=bucket(start + width, self.length))
        return self.model(
            torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            cache=some,
            last_only=True,
        )[:, -1]

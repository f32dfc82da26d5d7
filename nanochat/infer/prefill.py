"""Prefill: many prompts at once into a scratch cache, each computed once however many rows will continue it.

The scratch is copied into the engine's rows afterwards. That costs a little bandwidth and buys that freed rows need not be
neighbours, that several samples share one prompt, and that a prefix shared by all prompts is computed a single time.
"""

import torch
from torch import Tensor

from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT

SHORTEST_PREFIX = 16  # tokens; a shorter common prefix costs more to copy than to compute


def bucket(length: int, longest: int, shortest: int = 64) -> int:
    """The smallest of 64, 128, 256, ... (or doubling from `shortest`) that holds `length` positions, at most `longest`."""
    size = shortest
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

    def __init__(self, model: GPT, rows: int, length: int, tokens: int):
        """rows: prompts at a time at most; tokens: in one forward pass at most, which bounds the activations."""
        self.model, self.rows, self.length, self.tokens = model, rows, length, tokens
        arguments = (length, model.device, model.compute_dtype)
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
        for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            longest = len(prompts[result[-1][0]]) if result else 0
            fits = result and len(result[-1]) < self.rows and (len(result[-1]) + 1) * longest <= self.tokens
            result[-1].append(index) if fits else result.append([index])
        return result

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]]) -> Tensor:
        """Fill the first rows of the scratch cache with these prompts; returns their last logits (P, V) float32."""
        start = len(self.prefix)
        if start:
            for scratch, shared in zip(self._tensors(self.scratch), self._tensors(self.shared), strict=True):
                scratch[: len(prompts), :start] = shared[:, :start]
        # A single long prompt goes in pieces, so that its activations stay bounded too.
        longest = max(len(prompt) for prompt in prompts)
        while len(prompts) == 1 and longest - start > self.tokens:
            self._forward(self.scratch, [prompts[0][start : start + self.tokens]], start)
            start += self.tokens
        return self._forward(self.scratch, [prompt[start:] for prompt in prompts], start)

    def copy(self, cache: KVCache, slots: Tensor, sources: Tensor, length: int) -> None:
        """Copy the first `length` positions of the scratch rows `sources` (n,) to the rows `slots` (n,) of the cache."""
        for target, scratch in zip(self._tensors(cache), self._tensors(self.scratch), strict=True):
            target[:, :length].index_copy_(0, slots, scratch[:, :length].index_select(0, sources))

    def extend(self, cache: KVCache, slot: int, tokens: list[int], start: int) -> Tensor:
        """Append tokens to one row of the cache from position `start`; returns the last logits (1, V) float32."""
        return self._forward(cache.sliced(first_row=slot, rows=1), [tokens], start)

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

    @staticmethod
    def _tensors(cache: KVCache) -> list[Tensor]:
        return cache.keys + cache.values

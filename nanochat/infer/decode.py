"""The decode step: embed, layers, head, sample, append, advance, stop test. All of it on the device, nothing waits for it.

A step is a function of tensors that stay where they are, so that on a GPU it is captured once for each (rows, length) and
replayed: at small batches the host could not launch the kernels as fast as they run. On a CPU the same function is called.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.infer.requests import MAX_STOP_IDS
from nanochat.infer.sampling import RowSampling, Sampling, sample
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT


@dataclass
class Rows:
    """The state of R rows on the device."""

    token: Tensor  # (R,) int64, the newest token; its key is not in the cache yet
    position: Tensor  # (R,) int64, where that token stands
    remaining: Tensor  # (R,) int64, tokens the row may still draw
    running: Tensor  # (R,) bool; the others are free or wait for the host, and change nothing that is read again
    stops: Tensor  # (R, MAX_STOP_IDS + 1) int64, -1 where unused; one more for the end of a tool call
    sampling: RowSampling
    drawn: Tensor  # (R, N) int64, what the last N steps drew, -1 where the row was not running
    column: Tensor  # (1,) int64, where in `drawn` the next step writes

    @classmethod
    def empty(cls, rows: int, burst: int, device: torch.device) -> "Rows":
        """All rows free; `burst` steps can run between two looks of the host."""
        return cls(
            token=torch.zeros(rows, dtype=torch.int64, device=device),
            position=torch.zeros(rows, dtype=torch.int64, device=device),
            remaining=torch.zeros(rows, dtype=torch.int64, device=device),
            running=torch.zeros(rows, dtype=torch.bool, device=device),
            stops=torch.full((rows, MAX_STOP_IDS + 1), -1, dtype=torch.int64, device=device),
            sampling=RowSampling.of([Sampling()] * rows, device),
            drawn=torch.full((rows, burst), -1, dtype=torch.int64, device=device),
            column=torch.zeros(1, dtype=torch.int64, device=device),
        )

    def first(self, rows: int) -> "Rows":
        """The first rows, as views."""
        return Rows(
            self.token[:rows],
            self.position[:rows],
            self.remaining[:rows],
            self.running[:rows],
            self.stops[:rows],
            self.sampling[:rows],
            self.drawn[:rows],
            self.column,
        )

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes row `source`, which is free afterwards."""
        tensors = [self.token, self.position, self.remaining, self.running, self.stops, *vars(self.sampling).values()]
        for tensor in tensors:
            tensor[target] = tensor[source]
        self.running[source] = False


def decode_step(model: GPT, cache: KVCache, rows: Rows, all_greedy: bool, any_filtered: bool) -> None:
    """Draw one token in each running row, in place.

    cache  over the same rows and as many positions as the step reads: a power-of-two bucket above the longest running row
    """
    # A row that stopped in an earlier, longer bucket may stand beyond this one; what it stores there is never read.
    position = rows.position.clamp_max(cache.length - 1)
    logits = model(rows.token[:, None], positions=position[:, None], cache=cache, last_only=True)[:, -1]  # (R, V)
    drawn = sample(logits, rows.sampling, rows.position + 1, all_greedy, any_filtered)
    advance(rows, drawn)


def advance(rows: Rows, drawn: Tensor) -> None:
    """Append what was drawn (R,) to the running rows; those that hit a stop token or their length stop running."""
    running = rows.running.clone()
    rows.drawn.index_copy_(1, rows.column, torch.where(running, drawn, -1)[:, None])
    rows.column += 1
    rows.token.copy_(torch.where(running, drawn, rows.token))
    rows.position += running
    rows.remaining -= running.to(torch.int64)
    stopped = (drawn[:, None] == rows.stops).any(-1) | (rows.remaining <= 0)
    rows.running.copy_(running & ~stopped)


class Decoder:
    """Runs decode steps: captured on a GPU, eager on a CPU or when asked."""

    def __init__(self, model: GPT, cache: KVCache, rows: Rows, graphs: bool, compile: bool = False):
        """compile: fuse the step's kernels with torch.compile, one compilation for each (rows, length)."""
        self.model, self.cache, self.rows, self.graphs = model, cache, rows, graphs
        self.step = decode_step
        if compile:
            # Each (rows, length) is a shape of its own; beyond 8 of them the compiler would silently give up.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.accumulated_recompile_limit = 1024
            self.step = torch.compile(decode_step, dynamic=False)
        self.captured: dict[tuple[int, int, bool, bool], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None

    @torch.no_grad()
    def run(self, steps: int, rows: int, length: int, all_greedy: bool, any_filtered: bool) -> None:
        """Decode `steps` tokens in the first `rows` rows, over the first `length` positions of the cache."""
        self.rows.column.zero_()
        if self.graphs:
            key = (rows, length, all_greedy, any_filtered)
            if key not in self.captured:
                self.captured[key] = self._capture(*key)
            for _ in range(steps):
                self.captured[key].replay()
            return
        cache, some = self.cache.sliced(rows=rows, length=length), self.rows.first(rows)
        for _ in range(steps):
            self.step(self.model, cache, some, all_greedy, any_filtered)

    def _capture(self, rows: int, length: int, all_greedy: bool, any_filtered: bool) -> torch.cuda.CUDAGraph:
        """Record one step. It is run before, as capture demands, with all rows halted: then it changes nothing that counts."""
        cache, some = self.cache.sliced(rows=rows, length=length), self.rows.first(rows)
        running = self.rows.running.clone()
        self.rows.running.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.rows.column.zero_()
                self.step(self.model, cache, some, all_greedy, any_filtered)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(self.model, cache, some, all_greedy, any_filtered)
        self.rows.running.copy_(running)
        self.rows.column.zero_()
        return graph

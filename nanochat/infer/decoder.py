"""Running decode steps: captured in CUDA graphs and replayed on a GPU, called one by one on a CPU.

At small batches the host could not launch the kernels as fast as they run, so a step is captured once for each (rows, reach,
kind of sampling). Launching a graph costs the host some time as well: steps are also captured several in a row.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat.infer.capacity import MOST_PROMPTS, PREFILL_ROWS
from nanochat.infer.decode import Arrivals, Rows, begin, decode_step
from nanochat.infer.fused_step import FusedStep
from nanochat.infer.sampling import Kind
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT

STEPS_IN_A_ROW = 16


def captured(work: Callable[[], Tensor | None], pool) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """A graph of `work`, and what it returned. It is run once before, as capture demands: what it does must bear that."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = work()
    return graph, result


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for each stream that it has worked on."""
    return torch.cuda.Stream(device)


class Decoder:
    """Decodes in the first rows of a cache. The last row of `rows` is no row of the cache: arrivals are padded with it."""

    def __init__(self, model: GPT, cache: KVCache, rows: Rows, graphs: bool, kernels: bool):
        """graphs: capture and replay; kernels: the Triton kernels of `fused_step` instead of the model's own operations."""
        self.model, self.cache, self.rows = model, cache, rows
        self.fused = FusedStep(model, cache, rows) if kernels else None
        self.steps: dict[tuple[int, int, Kind, int], torch.cuda.CUDAGraph] = {}
        self.beginnings: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Arrivals, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        prompts = min(cache.rows, MOST_PROMPTS if kernels else PREFILL_ROWS)
        self.logits = torch.zeros(
            prompts, model.config.vocab_size, device=model.device
        )  # of the newest prompts, float32

    @torch.no_grad()
    def run(self, steps: int, rows: int, length: int, kind: Kind) -> None:
        """Decode `steps` tokens in the first `rows` rows, of which none comes to fill more than `length` positions."""
        # The kernels read what is filled and no more: all that a captured step fixes is into how many parts that is divided.
        reach = self.fused.splits(rows, length) if self.fused else length
        self.rows.column.zero_()
        if self.pool is None:
            self._run(rows, reach, kind, steps)
            return
        # Single steps first: the device works on them while the host launches the others, each of which takes it longer.
        launches = [1] * (steps % STEPS_IN_A_ROW) + [STEPS_IN_A_ROW] * (steps // STEPS_IN_A_ROW)
        keys = [(rows, reach, kind, together) for together in launches]
        # All are captured before the first is replayed: a capture writes to `drawn` too, where a replay has written before.
        for key in keys:
            if key not in self.steps:
                self.steps[key] = self._capture(*key)
        for key in keys:
            self.steps[key].replay()

    @torch.no_grad()
    def begin(self, logits: Tensor, arrivals: Arrivals, kind: Kind) -> Tensor:
        """`decode.begin` for arrivals from the CPU; does not wait for the device. What it returns the next call may overwrite."""
        if self.pool is None:
            return begin(self.rows, logits, arrivals.to(logits.device), kind)
        if logits.data_ptr() != self.logits.data_ptr():
            self.logits[: len(logits)].copy_(logits)
        count = len(arrivals)
        padded = arrivals.padded(1 << (count - 1).bit_length(), slot=len(self.rows.token) - 1)
        key = (len(padded), kind)
        if key not in self.beginnings:
            inputs = padded.to(logits.device)
            graph, drawn = captured(lambda: begin(self.rows, self.logits, inputs, kind), self.pool)
            self.beginnings[key] = graph, inputs, drawn
        graph, inputs, drawn = self.beginnings[key]
        inputs.copy_(padded)
        graph.replay()
        return drawn[:count]

    def _run(self, rows: int, reach: int, kind: Kind, steps: int) -> None:
        """Launch that many steps."""
        if self.fused:
            self.fused(rows, reach, kind, steps)
            return
        for _ in range(steps):
            decode_step(self.model, self.cache.sliced(rows=rows, length=reach), self.rows.first(rows), kind)

    def _capture(self, rows: int, reach: int, kind: Kind, steps: int) -> torch.cuda.CUDAGraph:
        """Record some steps. They are run before with all rows halted: then they change nothing that counts."""
        running, column = self.rows.running.clone(), self.rows.column.clone()
        self.rows.running.zero_()
        self.rows.column.zero_()

        graph, _ = captured(lambda: self._run(rows, reach, kind, steps), self.pool)
        self.rows.running.copy_(running)
        self.rows.column.copy_(column)
        return graph

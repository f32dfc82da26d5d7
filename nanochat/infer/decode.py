"""The decode step: embed, layers, head, sample, append, advance, stop test. All of it on the device, nothing waits for it.

A step is a function of tensors that stay where they are, so that on a GPU it can be captured and replayed (`decoder`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.infer.requests import MAX_STOP_IDS
from nanochat.infer.sampling import Kind, RowSampling, Sampling, sample
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT
from nanochat.transfer import send


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

    def move(self, pairs: list[tuple[int, int]]) -> None:
        """For each pair (target, source): row `target` becomes row `source`, which is free afterwards."""
        targets, sources = torch.tensor(pairs, device=self.token.device).unbind(1)
        tensors = [self.token, self.position, self.remaining, self.running, self.stops, *vars(self.sampling).values()]
        for tensor in tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))
        self.running.index_fill_(0, sources, False)


def decode_step(model: GPT, cache: KVCache, rows: Rows, kind: Kind) -> None:
    """Draw one token in each running row, in place. `fused_step` does the same in fewer kernels where it can.

    cache  over the same rows and as many positions as the step reads: a power-of-two bucket above the longest running row
    """
    # A row that ended in an earlier, longer bucket may stand beyond this one; what it stores there is never read.
    position = rows.position.clamp_max(cache.length - 1)
    logits = model(rows.token[:, None], positions=position[:, None], cache=cache, last_only=True)[:, -1]  # (R, V)
    drawn = sample(logits, rows.sampling, rows.position + 1, kind)
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


@dataclass(frozen=True)
class Arrivals:
    """n rows that begin to decode, as the host says it: two small tensors, since each copy to a GPU takes a while."""

    whole: Tensor  # (n, 6 + MAX_STOP_IDS + 1) int64: source, slot, position, remaining, top_k, seed, stops
    real: Tensor  # (n, 3) float32: temperature, top_p, min_p

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int, list[int], Sampling]]) -> "Arrivals":
        """On the CPU, from (source, slot, position, remaining, stops, sampling) of each row."""
        whole, real = [], []
        for source, slot, position, remaining, stops, sampling in rows:
            padding = [-1] * (MAX_STOP_IDS + 1 - len(stops))
            numbers = [source, slot, position, remaining, sampling.top_k, sampling.seed & 0xFFFFFFFF]
            whole.append([*numbers, *stops, *padding])
            real.append([sampling.temperature, sampling.top_p, sampling.min_p])
        return cls(torch.tensor(whole), torch.tensor(real, dtype=torch.float32))

    def __len__(self) -> int:
        return len(self.whole)

    def to(self, device: torch.device) -> "Arrivals":
        return Arrivals(self.whole.to(device), self.real.to(device))

    def copy_(self, other: "Arrivals") -> None:
        """Become the other, which is on the CPU, in place; does not wait for the device."""
        send(other.whole, self.whole)
        send(other.real, self.real)

    def padded(self, count: int, slot: int) -> "Arrivals":
        """`count` rows: copies of the last are added, which all go to `slot` and halt at once."""
        whole, real = (side[[*range(len(self)), *[-1] * (count - len(self))]] for side in (self.whole, self.real))
        whole[len(self) :, 1] = slot
        whole[len(self) :, 3] = 0  # remaining
        return Arrivals(whole, real)


@torch.no_grad()
def begin(state: Rows, logits: Tensor, arrivals: Arrivals, kind: Kind) -> Tensor:
    """Draw the next token of each arriving row from the logits (P, V) of its source, and set it running; returns (n,) int64.

    Each row draws with noise of its own, also where several continue the same prompt.
    """
    source, slot, position, remaining, top_k, seed = arrivals.whole[:, :6].unbind(1)
    stops = arrivals.whole[:, 6:]
    temperature, top_p, min_p = arrivals.real.unbind(1)
    sampling = RowSampling(temperature, top_k, top_p, min_p, seed)
    drawn = sample(logits.index_select(0, source), sampling, position, kind)
    stopped = (drawn[:, None] == stops).any(-1) | (remaining <= 0)
    state.sampling.put(slot, sampling)
    for tensor, rows in (
        (state.stops, stops),
        (state.position, position),
        (state.remaining, remaining),
        (state.token, drawn),
        (state.running, ~stopped),
    ):
        tensor.index_copy_(0, slot, rows)
    return drawn

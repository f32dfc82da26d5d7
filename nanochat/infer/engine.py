"""The engine: every generation of the project, for evaluation, samples and chat.

Continuous batching: the cache has a fixed number of rows. A request takes a free one, is prefilled, decodes beside the others
and frees its row, which the next request takes; the device decodes a burst of steps, then the host looks at what was drawn.
Several samples of one prompt are prefilled once and drawn independently, the first token too.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hardware import host_memory_bytes
from nanochat.infer import scoring
from nanochat.infer.calculator import calculate
from nanochat.infer.capacity import PREFILL_ROWS, engine_bytes, rows_that_fit
from nanochat.infer.decode import Decoder, Rows
from nanochat.infer.prefill import Prefill, bucket
from nanochat.infer.requests import MAX_STOP_IDS, Completion, Request, Scored, StopReason
from nanochat.infer.sampling import RowSampling, sample
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT

MAX_BURST = 64


@dataclass
class _Job:
    """One sample of one request, and what it has so far."""

    request_index: int
    sample: int
    request: Request
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.request.prompt) + len(self.ids) - 1

    @property
    def remaining(self) -> int:
        return self.request.max_new_tokens - len(self.ids)


@dataclass(frozen=True)
class Event:
    """New tokens of a sample, and its end when it has one."""

    request: int
    sample: int
    ids: list[int]
    stop_reason: StopReason | None = None


class Engine:
    """A model, a cache of `rows` rows of `length` positions, and a tokenizer (needed for the calculator only)."""

    def __init__(
        self,
        model: GPT,
        tokenizer=None,
        rows: int = 1,
        length: int | None = None,
        graphs: bool | None = None,
        compile: bool = False,
        shortest_bucket: int = 64,
    ):
        """Allocate all the memory that the engine will hold.

        length   positions of a row, prompt and new tokens together; None: the model's training length
        graphs   replay captured steps; None: on a GPU
        compile  fuse the kernels of a step; one compilation for each shape, which pays for long runs only
        shortest_bucket  positions that a step reads at least; the buckets double from there to `length`
        Raises UserError when that many rows do not fit.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        self.rows, self.length = rows, length or model.config.sequence_length
        self.shortest_bucket = shortest_bucket
        device = model.device
        if self.length > model.cos.size(0):
            raise UserError(
                f"length = {self.length:,}: the model's rotary table reaches {model.cos.size(0):,} positions."
            )
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory_bytes()
        itemsize = model.compute_dtype.itemsize
        if engine_bytes(model.config, rows, self.length, itemsize) > free:
            raise UserError(
                f"rows = {rows} of length {self.length:,}: the cache takes "
                f"{engine_bytes(model.config, rows, self.length, itemsize) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free. "
                f"At most {rows_that_fit(model.config, self.length, itemsize, free)} rows fit."
            )
        self.cache = KVCache(model.config, rows, self.length, device, model.compute_dtype)
        self.prefill = Prefill(
            model, min(rows, PREFILL_ROWS), self.length, tokens=16_384 if device.type == "cuda" else 4_096
        )
        self.state = Rows.empty(rows, MAX_BURST, device)
        self.decoder = Decoder(
            model, self.cache, self.state, device.type == "cuda" if graphs is None else graphs, compile=compile
        )
        # On a GPU a look at the result stalls it; a row that stops early idles until then.
        self.burst = 16 if device.type == "cuda" else 1
        self.row_buckets = sorted({min(2**i, rows) for i in range(rows.bit_length() + 1)})

    def generate(self, requests: list[Request]) -> list[Completion]:
        """All samples of all requests, in that order. One that cannot be served comes back with `error`; the others go on."""
        errors = [request.problem(self.model.config.vocab_size, self.length) for request in requests]
        ids: dict[tuple[int, int], list[int]] = {}
        reasons: dict[tuple[int, int], StopReason] = {}
        for event in self._run([(i, request) for i, request in enumerate(requests) if errors[i] is None]):
            ids.setdefault((event.request, event.sample), []).extend(event.ids)
            if event.stop_reason:
                reasons[event.request, event.sample] = event.stop_reason
        completions = []
        for i, request in enumerate(requests):
            if errors[i] is not None:
                completions.append(Completion(i, 0, [], "error", errors[i]))
                continue
            completions += [Completion(i, n, ids[i, n], reasons[i, n]) for n in range(request.samples)]
        return completions

    def stream(self, request: Request) -> Iterator[int]:
        """The ids of one sample as they come. Raises UserError when the request cannot be served."""
        if problem := request.problem(self.model.config.vocab_size, self.length):
            raise UserError(f"{problem}.")
        for event in self._run([(0, request)]):
            yield from event.ids

    def logprobs(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        """How probable each (context, continuation) is; see `scoring.logprobs`."""
        return scoring.logprobs(self.model, pairs, self.length)

    def _run(self, requests: list[tuple[int, Request]]) -> Iterator[Event]:
        """Serve the requests; a generator that is closed half-way leaves the engine ready for the next call."""
        queue = deque(_Job(i, n, request) for i, request in requests for n in range(request.samples))
        slots: dict[int, _Job] = {}
        self.state.running.zero_()
        if requests:
            self.prefill.share(list({tuple(request.prompt): list(request.prompt) for _, request in requests}.values()))
        while queue or slots:
            if queue and len(slots) < self.rows:
                yield from self._admit(queue, slots)
            if not slots:
                continue
            self._compact(slots)
            yield from self._harvest(slots, self._decode(slots, waiting=bool(queue)))

    def _admit(self, queue: deque[_Job], slots: dict[int, _Job]) -> Iterator[Event]:
        """Prefill as many waiting jobs as rows are free, and draw the first token of each."""
        free = [slot for slot in range(self.rows) if slot not in slots]
        jobs = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        by_prompt: dict[tuple[int, ...], list[_Job]] = {}
        for job in jobs:
            by_prompt.setdefault(tuple(job.request.prompt), []).append(job)
        prompts = [list(prompt) for prompt in by_prompt]
        for batch in self.prefill.batches(prompts):
            logits = self.prefill([prompts[i] for i in batch])  # (P, V)
            sharing = [by_prompt[tuple(prompts[i])] for i in batch]
            taken = [(free.pop(0), source, job) for source, group in enumerate(sharing) for job in group]
            slot_ids = self._tensor([slot for slot, _, _ in taken])
            sources = self._tensor([source for _, source, _ in taken])
            self.prefill.copy(self.cache, slot_ids, sources, max(len(prompts[i]) for i in batch))
            slots.update({slot: job for slot, _, job in taken})
            drawn = self._start(slot_ids, [job for _, _, job in taken], logits.index_select(0, sources))
            yield from self._harvest(slots, dict(zip([slot for slot, _, _ in taken], drawn, strict=True)))

    def _start(self, slots: Tensor, jobs: list[_Job], logits: Tensor) -> list[list[int]]:
        """Draw the next token of these rows (n,), each with noise of its own, from their logits (n, V), and set them running.

        Returns the tokens, one in a list per row, as `_decode` does.
        """
        state, stops = self.state, []
        for job in jobs:
            ids = [*job.request.stop_ids, *([self._special("python_end")] if job.request.calculator else [])]
            stops.append(ids + [-1] * (MAX_STOP_IDS + 1 - len(ids)))
        settings = [job.request.sampling(job.sample) for job in jobs]
        sampling, stop_ids = RowSampling.of(settings, slots.device), self._tensor(stops)
        position = self._tensor([job.position + 1 for job in jobs])
        remaining = self._tensor([job.remaining - 1 for job in jobs])
        drawn = sample(logits, sampling, position, *self._variant(jobs))
        stopped = (drawn[:, None] == stop_ids).any(-1) | (remaining <= 0)
        state.sampling.put(slots, sampling)
        for tensor, rows in (
            (state.stops, stop_ids),
            (state.position, position),
            (state.remaining, remaining),
            (state.token, drawn),
            (state.running, ~stopped),
        ):
            tensor.index_copy_(0, slots, rows)
        return drawn[:, None].tolist()

    def _decode(self, slots: dict[int, _Job], waiting: bool) -> dict[int, list[int]]:
        """Run a burst of steps; what each row drew, -1 behind its end. `waiting`: jobs wait for a row."""
        jobs = slots.values()
        burst = self.burst
        if burst > 1 and not waiting and not any(job.request.stop_ids or job.request.calculator for job in jobs):
            burst = MAX_BURST  # nothing to look for on the way
        steps = min(burst, max(job.remaining for job in jobs))
        reach = max(job.position + min(steps, job.remaining) for job in jobs)
        rows = self._row_bucket(max(slots) + 1)
        length = bucket(reach, self.length, self.shortest_bucket)
        self.decoder.run(steps, rows, length, *self._variant(jobs))
        drawn = self.state.drawn[:rows, :steps].tolist()  # the burst's one wait for the device
        return {slot: drawn[slot] for slot in slots}

    def _harvest(self, slots: dict[int, _Job], drawn: dict[int, list[int]]) -> Iterator[Event]:
        """Hand out what was drawn, free the rows that ended, answer tool calls."""
        while drawn:
            again: dict[int, list[int]] = {}
            for slot, tokens in drawn.items():
                job = slots[slot]
                new, reason = self._accept(job, tokens)
                if reason is None and job.request.calculator and job.ids[-1] == self._special("python_end"):
                    forced = self._tool_output(job)
                    if len(forced) < job.remaining:
                        first = job.position
                        job.ids += forced
                        new += forced
                        logits = self.prefill.extend(self.cache, slot, job.ids[-len(forced) - 1 :], first)
                        again[slot] = self._start(self._tensor([slot]), [job], logits)[0]
                    else:
                        reason = "length"
                if reason is not None:
                    del slots[slot]
                yield Event(job.request_index, job.sample, new, reason)
            drawn = again

    @staticmethod
    def _accept(job: _Job, tokens: list[int]) -> tuple[list[int], StopReason | None]:
        """Append to the job what it drew up to its end; returns the new ids and why it ended, if it did."""
        new: list[int] = []
        for token in tokens:
            if token < 0:
                break
            if token in job.request.stop_ids:
                return new, "stop"
            new.append(token)
            job.ids.append(token)
        return new, "length" if job.remaining <= 0 else None

    def _tool_output(self, job: _Job) -> list[int]:
        """What the calculator answers to the tool call that just ended, as tokens; nothing when it cannot."""
        start = self._special("python_start")
        call = job.ids[:-1]
        if start not in call:
            return []
        expression = call[len(call) - call[::-1].index(start) :]
        result = calculate(self.tokenizer.decode(expression))
        if result is None:
            return []
        return [self._special("output_start"), *self.tokenizer.encode(result), self._special("output_end")]

    def _compact(self, slots: dict[int, _Job]) -> None:
        """Move the last rows to free ones further up when fewer rows can then be decoded."""
        while self._row_bucket(len(slots)) < self._row_bucket(max(slots) + 1):
            source = max(slots)
            target = next(slot for slot in range(self.rows) if slot not in slots)
            job = slots[target] = slots.pop(source)
            self.state.move(source, target)
            for side in self.cache.keys + self.cache.values:
                side[target, : job.position] = side[source, : job.position]

    def _row_bucket(self, rows: int) -> int:
        return next(size for size in self.row_buckets if size >= rows)

    @staticmethod
    def _variant(jobs) -> tuple[bool, bool]:
        """(all greedy, any filtered): what sampling may leave out."""
        settings = [job.request.sampling(job.sample) for job in jobs]
        return all(each.greedy for each in settings), any(each.filtered for each in settings)

    def _special(self, name: str) -> int:
        return self.tokenizer.special(f"<|{name}|>")

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)

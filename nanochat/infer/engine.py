"""The engine: every generation of the project, for evaluation, samples and chat.

Continuous batching: the cache has a fixed number of rows. A request takes a free one, is prefilled, decodes beside the others
and frees its row, which the next request takes; the device decodes a burst of steps, then the host looks at what was drawn.
Several samples of one prompt are prefilled once and drawn independently, the first token too. Those with most tokens to draw
begin first: one that begins last goes on alone at the end, which costs nearly as much as with the others beside it.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.hardware import host_memory_bytes
from nanochat.infer import scoring
from nanochat.infer.calculator import calculate
from nanochat.infer.capacity import PREFILL_ROWS, PREFILL_TOKENS, engine_bytes, rows_that_fit
from nanochat.infer.decode import Arrivals, Rows
from nanochat.infer.decoder import Decoder
from nanochat.infer.fused_prefill import FusedPrefill
from nanochat.infer.fused_step import unusable
from nanochat.infer.prefill import Prefill, bucket
from nanochat.infer.requests import Completion, Request, Scored, StopReason
from nanochat.infer.sampling import Kind
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT
from nanochat.transfer import Readback

MAX_BURST = 256
PASS_TOKENS = {"cuda": PREFILL_TOKENS, "cpu": PREFILL_TOKENS // 4}  # of prompts in one pass


@dataclass
class _Job:
    """One sample of one request, and what it has so far."""

    request_index: int
    sample: int
    request: Request
    ids: list[int] = field(default_factory=list)
    unread: int = 0  # tokens that the device draws and the host has not looked at

    @property
    def drawn(self) -> int:
        return len(self.ids) + self.unread

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.request.prompt) + self.drawn - 1

    @property
    def remaining(self) -> int:
        return self.request.max_new_tokens - self.drawn


_Taken = tuple[int, int, _Job]  # which of the prompts, the row that continues it, and its job


@dataclass(frozen=True)
class _Burst:
    """Steps that the device works on: the rows, and the job of each row with the tokens that it had when they were launched."""

    rows: int
    steps: int
    jobs: dict[int, tuple[_Job, int]]


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
        kernels: bool | None = None,
    ):
        """Allocate all the memory that the engine will hold.

        length   positions of a row, prompt and new tokens together; None: the model's training length
        graphs   replay captured steps; None: on a GPU
        kernels  decode with the Triton kernels; None: where they can (`fused_step.unusable`)
        Raises UserError when that many rows do not fit.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        self.rows, self.length = rows, length or model.config.sequence_length
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
        graphs = device.type == "cuda" if graphs is None else graphs
        kernels = unusable(model) is None if kernels is None else kernels
        self.state = Rows.empty(rows + 1, MAX_BURST, device)  # one more that arrivals are padded with
        self.decoder = Decoder(model, self.cache, self.state, graphs, kernels)
        fused = FusedPrefill(self.decoder) if kernels else None
        self.prefill = Prefill(model, self.cache, min(rows, PREFILL_ROWS), PASS_TOKENS[device.type], fused)
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
        jobs = [_Job(i, n, request) for i, request in requests for n in range(request.samples)]
        queue = deque(sorted(jobs, key=lambda job: -job.remaining))
        slots: dict[int, _Job] = {}
        self.state.running.zero_()
        if requests:
            self.prefill.share(list({tuple(request.prompt): list(request.prompt) for _, request in requests}.values()))
        while queue or slots:
            self._compact(slots, coming=len(queue))
            started = self._admit(queue, slots) if queue and len(slots) < self.rows else []
            burst = self._decode(slots, waiting=bool(queue))
            # The device decodes while the first tokens are handed out.
            for taken, drawn in started:
                yield from self._harvest(slots, self._first_tokens(taken, drawn))
            yield from self._harvest(slots, self._drawn(slots, burst))

    def _admit(self, queue: deque[_Job], slots: dict[int, _Job]) -> list[tuple[list[_Taken], Readback]]:
        """Prefill as many waiting jobs as rows are free; returns the rows taken, and their first tokens on the way."""
        free = [slot for slot in range(self.rows) if slot not in slots]
        jobs = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        by_prompt: dict[tuple[int, ...], list[_Job]] = {}
        for job in jobs:
            by_prompt.setdefault(tuple(job.request.prompt), []).append(job)
        prompts = [list(prompt) for prompt in by_prompt]
        started = []
        for batch in self.prefill.batches(prompts):
            sharing = [[(free.pop(0), job) for job in by_prompt[tuple(prompts[i])]] for i in batch]
            logits = self.prefill([prompts[i] for i in batch], [[slot for slot, _ in group] for group in sharing])
            taken = [(source, slot, job) for source, group in enumerate(sharing) for slot, job in group]
            slots.update({slot: job for _, slot, job in taken})
            started.append((taken, self._start(taken, logits)))
        return started

    def _start(self, taken: list[_Taken], logits: Tensor) -> Readback:
        """Draw the next token of rows from their source in the logits (P, V) and set them running: (n,) int64, on the way."""
        rows = []
        for source, slot, job in taken:
            stops = [*job.request.stop_ids, *([self._special("python_end")] if job.request.calculator else [])]
            sampling = job.request.sampling(job.sample)
            job.unread = 1
            rows.append((source, slot, job.position, job.remaining, stops, sampling))
        return Readback(self.decoder.begin(logits, Arrivals.of(rows), self._kind(job for _, _, job in taken)))

    @staticmethod
    def _first_tokens(taken: list[_Taken], drawn: Readback) -> dict[int, list[int]]:
        """What `_start` has drawn, as `_drawn` returns it."""
        return {slot: [token] for (_, slot, _), token in zip(taken, drawn.wait(), strict=True)}

    def _decode(self, slots: dict[int, _Job], waiting: bool) -> _Burst:
        """Launch a burst of steps. `waiting`: jobs wait for a row."""
        jobs = slots.values()
        burst, left = self.burst, max(job.remaining for job in jobs)
        if burst > 1 and not any(job.request.stop_ids or job.request.calculator for job in jobs):
            # Nothing to look for on the way to where a row is free, or fewer rows are left.
            burst = max(burst, min(MAX_BURST, self._steps_to_an_end(slots, waiting)))
        steps = min(burst, left)
        rows = self._row_bucket(max(slots) + 1)
        if steps:
            reach = max(job.position + min(steps, job.remaining) for job in jobs)
            self.decoder.run(steps, rows, bucket(reach, self.length), self._kind(jobs))
        return _Burst(rows, steps, {slot: (job, job.drawn) for slot, job in slots.items()})

    def _steps_to_an_end(self, slots: dict[int, _Job], waiting: bool) -> int:
        """Steps until a job has all its tokens; with none waiting, until so many have that fewer rows can be decoded, or none is left."""
        steps = sorted(job.remaining for job in slots.values())
        fewer = max((size for size in self.row_buckets if size < len(slots)), default=0)
        return steps[0 if waiting else len(slots) - fewer - 1]

    def _drawn(self, slots: dict[int, _Job], burst: _Burst) -> dict[int, list[int]]:
        """What each row of a burst drew, -1 behind its end; the burst's one wait for the device.

        Without the rows whose first token was an end, or a call of the tool that was answered since: they had no part in it.
        """
        if not burst.steps:
            return {}
        drawn = self.state.drawn[: burst.rows, : burst.steps].tolist()
        went_on = (slot for slot, (job, had) in burst.jobs.items() if slots.get(slot) is job and job.drawn == had)
        return {slot: drawn[slot] for slot in went_on}

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
                        logits = self.prefill.extend(slot, job.ids[-len(forced) - 1 :], first)
                        taken = [(0, slot, job)]
                        again |= self._first_tokens(taken, self._start(taken, logits))
                    else:
                        reason = "length"
                if reason is not None:
                    del slots[slot]
                yield Event(job.request_index, job.sample, new, reason)
            drawn = again

    @staticmethod
    def _accept(job: _Job, tokens: list[int]) -> tuple[list[int], StopReason | None]:
        """Append to the job what it drew up to its end; returns the new ids and why it ended, if it did."""
        if tokens[0] < 0:
            raise RuntimeError("a running row drew no token: it would be waited for forever")
        new = tokens[: tokens.index(-1)] if tokens[-1] < 0 else tokens  # -1 stands behind a row's end
        stops = job.request.stop_ids
        stop = next((i for i, token in enumerate(new) if token in stops), None) if stops else None
        new = new[:stop]
        job.ids += new
        job.unread = 0
        if stop is not None:
            return new, "stop"
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

    def _compact(self, slots: dict[int, _Job], coming: int) -> None:
        """Move the last rows to free ones further up when fewer rows can then be decoded, with `coming` jobs that wait for one."""
        rows = self._row_bucket(min(self.rows, len(slots) + coming))
        free = (slot for slot in range(rows) if slot not in slots)
        pairs = [(next(free), source) for source in sorted(slots) if source >= rows]
        if not pairs:
            return
        for target, source in pairs:
            slots[target] = slots.pop(source)
        self.state.move(pairs)
        self.cache.copy_rows(self.cache, pairs, max(slots[target].position for target, _ in pairs))

    def _row_bucket(self, rows: int) -> int:
        return next(size for size in self.row_buckets if size >= rows)

    @staticmethod
    def _kind(jobs: Iterable[_Job]) -> Kind:
        return Kind.of([job.request.sampling(job.sample) for job in jobs])

    def _special(self, name: str) -> int:
        return self.tokenizer.special(f"<|{name}|>")

"""The engine: every generation of the project, for evaluation, samples and chat.

Continuous batching: the cache has a fixed number of rows. A request takes a free one, is prefilled, decodes beside the others
and frees its row, which the next request takes. Several samples of one prompt are prefilled once and drawn independently, the first
token too. Those with most tokens to draw begin first: one that begins last goes on alone at the end, which costs nearly as
much as with the others beside it.

The device decodes a burst of steps, then the host looks at what was drawn. On a GPU the next burst is launched before: a row that
has met a stop token halts by itself, and one whose last token is on its way is free for the next request already, since
whatever is launched comes behind it.
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
from nanochat.infer.sampling import Kind, Sampling
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT
from nanochat.transfer import Readback

MAX_BURST = 256
PASS_TOKENS = {"cuda": PREFILL_TOKENS, "cpu": PREFILL_TOKENS // 4}  # of prompts in one pass


@dataclass(eq=False)
class _Job:
    """One sample of one request, what it has so far, and what of it is on its way."""

    request_index: int
    sample: int
    request: Request
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    slot: int = -1  # its row
    unread: int = 0  # tokens that the device draws, at most, and the host has not looked at
    starts: int = 0  # how often it was set running: what was launched before the last time is void
    ended: bool = False

    @property
    def position(self) -> int:
        """Where the newest token stands, if the row has not halted before."""
        return len(self.request.prompt) + len(self.ids) + self.unread - 1

    @property
    def remaining(self) -> int:
        """Tokens that are still to be launched."""
        return self.request.max_new_tokens - len(self.ids) - self.unread


@dataclass(frozen=True)
class _Launched:
    """Tokens on their way to the host: (n, steps), -1 where a row had halted."""

    drawn: Readback
    lines: list[tuple[int, _Job, int, int]]  # which line of them, whose it is, tokens at most, the job's `starts` then


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
        # Steps between two looks, and bursts under way at a look: on a GPU it works on meanwhile, and a row that stops idles until then.
        self.burst, self.ahead = (8, 1) if device.type == "cuda" else (1, 0)
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
        jobs = [_Job(i, n, request, request.sampling(n)) for i, request in requests for n in range(request.samples)]
        queue = deque(sorted(jobs, key=lambda job: -job.remaining))
        slots: dict[int, _Job] = {}
        launched: deque[_Launched] = deque()
        self.state.running.zero_()
        if requests:
            self.prefill.share(list({tuple(request.prompt): list(request.prompt) for _, request in requests}.values()))
        while queue or slots or launched:
            self._compact(slots, coming=len(queue))
            if queue and len(slots) < self.rows:
                launched += self._admit(queue, slots)
            burst = self._decode(slots, waiting=bool(queue))
            if burst:
                launched.append(burst)
            self._release(slots)
            for _ in range(len(launched) - (self.ahead if burst else 0)):
                yield from self._harvest(slots, launched)

    def _admit(self, queue: deque[_Job], slots: dict[int, _Job]) -> list[_Launched]:
        """Prefill as many waiting jobs as rows are free, and set them running."""
        free = [slot for slot in range(self.rows) if slot not in slots]
        jobs = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        by_prompt: dict[tuple[int, ...], list[_Job]] = {}
        for job in jobs:
            by_prompt.setdefault(tuple(job.request.prompt), []).append(job)
        prompts = [list(prompt) for prompt in by_prompt]
        started = []
        for batch in self.prefill.batches(prompts):
            sharing = [by_prompt[tuple(prompts[i])] for i in batch]
            for job in (job for group in sharing for job in group):
                job.slot = free.pop(0)
                slots[job.slot] = job
            logits = self.prefill([prompts[i] for i in batch], [[job.slot for job in group] for group in sharing])
            started.append(
                self._start([(source, job) for source, group in enumerate(sharing) for job in group], logits)
            )
        return started

    def _start(self, jobs: list[tuple[int, _Job]], logits: Tensor) -> _Launched:
        """Draw the next token of each job from its line of the logits (P, V), and set its row running."""
        rows = []
        for source, job in jobs:
            stops = [*job.request.stop_ids, *([self._special("python_end")] if job.request.calculator else [])]
            job.unread, job.starts = 1, job.starts + 1
            rows.append((source, job.slot, job.position, job.remaining, stops, job.sampling))
        drawn = self.decoder.begin(logits, Arrivals.of(rows), self._kind(job for _, job in jobs))
        return _Launched(Readback(drawn[:, None]), [(line, job, 1, job.starts) for line, (_, job) in enumerate(jobs)])

    def _decode(self, slots: dict[int, _Job], waiting: bool) -> _Launched | None:
        """Launch a burst of steps of the rows that have tokens left to draw, if any has. `waiting`: jobs wait for a row."""
        jobs = [job for job in slots.values() if job.remaining]
        if not jobs:
            return None
        burst = self.burst
        if burst > 1 and not any(job.request.stop_ids or job.request.calculator for job in jobs):
            # Nothing to look for on the way to where a row is free, or fewer rows are left.
            burst = max(burst, min(MAX_BURST, self._steps_to_an_end(jobs, waiting)))
        steps = min(burst, max(job.remaining for job in jobs))
        rows = self._row_bucket(max(job.slot for job in jobs) + 1)
        # A row that halted at a call to a tool is still decoded, which stores its last token once more: beyond the bucket that would
        # be inside of what it goes on from.
        reach = max(job.position + min(steps, job.remaining) for job in slots.values())
        self.decoder.run(steps, rows, bucket(reach, self.length), self._kind(jobs))
        lines = [(job.slot, job, min(steps, job.remaining), job.starts) for job in jobs]
        for _, job, most, _ in lines:
            job.unread += most
        return _Launched(Readback(self.state.drawn[:rows, :steps]), lines)

    def _steps_to_an_end(self, jobs: list[_Job], waiting: bool) -> int:
        """Steps until a job has all its tokens; with none waiting, until so many have that fewer rows can be decoded, or none is left."""
        steps = sorted(job.remaining for job in jobs)
        fewer = max((size for size in self.row_buckets if size < len(jobs)), default=0)
        return steps[0 if waiting else len(jobs) - fewer - 1]

    @staticmethod
    def _release(slots: dict[int, _Job]) -> None:
        """Free the rows whose last token is launched; not where a tool's answer may still have to be put behind a call."""
        for job in [job for job in slots.values() if not job.remaining and not job.request.calculator]:
            del slots[job.slot]

    def _harvest(self, slots: dict[int, _Job], launched: deque[_Launched]) -> Iterator[Event]:
        """Wait for what was launched first and hand it out, free the rows that ended, answer tool calls."""
        oldest = launched.popleft()
        drawn = oldest.drawn.wait()
        for line, job, most, starts in oldest.lines:
            if job.ended or job.starts != starts:  # halted, or set running again, before this was drawn
                continue
            job.unread -= most
            new, reason = self._accept(job, drawn[line][:most])
            if reason is None and job.request.calculator and job.ids[-1] == self._special("python_end"):
                job.unread = 0  # whatever was launched since finds the row halted
                forced = self._tool_output(job)
                if len(forced) < job.remaining:
                    first = job.position
                    job.ids += forced
                    new += forced
                    logits = self.prefill.extend(job.slot, job.ids[-len(forced) - 1 :], first)
                    launched.append(self._start([(0, job)], logits))
                else:
                    reason = "length"
            if reason is not None:
                job.ended = True
                if slots.get(job.slot) is job:
                    del slots[job.slot]
            yield Event(job.request_index, job.sample, new, reason)

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
        if stop is not None:
            return new, "stop"
        return new, "length" if len(job.ids) == job.request.max_new_tokens else None

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
        if not slots:
            return
        rows = self._row_bucket(min(self.rows, len(slots) + coming))
        free = (slot for slot in range(rows) if slot not in slots)
        pairs = [(next(free), source) for source in sorted(slots) if source >= rows]
        if not pairs:
            return
        for target, source in pairs:
            slots[target] = slots.pop(source)
            slots[target].slot = target
        self.state.move(pairs)
        self.cache.copy_rows(self.cache, pairs, max(slots[target].position for target, _ in pairs))

    def _row_bucket(self, rows: int) -> int:
        return next(size for size in self.row_buckets if size >= rows)

    @staticmethod
    def _kind(jobs: Iterable[_Job]) -> Kind:
        return Kind.of([job.sampling for job in jobs])

    def _special(self, name: str) -> int:
        return self.tokenizer.special(f"<|{name}|>")

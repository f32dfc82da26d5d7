import random
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import ADDITIONS
from nanochat.errors import UserError
from nanochat.infer import decoder
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.model.attention import KVCache

VOCAB = 97  # of the tiny model


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_greedy_decode_equals_recompute(kv_heads, tiny_model, recomputed):
    """Token for token, for prompts that begin before, at and behind the edges of the length buckets."""
    model = tiny_model(seed=kv_heads, kv_heads=kv_heads)
    requests = [Request(prompt(n, seed=n), 12) for n in (1, 2, 31, 55, 63, 64, 65, 120, 127, 128, 129, 148)]
    completions = Engine(model, rows=5).generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.ids == recomputed(model, request.prompt, 12)
        assert completion.stop_reason == "length"


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_greedy_decode_with_windows_equals_recompute(kv_heads, tiny_model, recomputed):
    """Prompts shorter than a window of 40, around it and longer, one of them in pieces, and new tokens that leave it."""
    model = tiny_model(seed=kv_heads, kv_heads=kv_heads, depth=5, additions=ADDITIONS)
    requests = [Request(prompt(n, seed=n), 45) for n in (1, 30, 39, 40, 41, 64, 110)]
    engine = Engine(model, rows=3)
    engine.prefill.tokens = 64
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert completion.ids == recomputed(model, request.prompt, 45)


def test_decode_to_the_last_position_equals_recompute(model, recomputed):
    request = Request(prompt(3), 157)
    assert Engine(model, rows=2).generate([request])[0].ids == recomputed(model, request.prompt, 157)


def test_a_shared_prefix_is_computed_once_and_changes_nothing(model, recomputed):
    shared = prompt(70)
    requests = [Request(shared + prompt(n, seed=n), 6) for n in (1, 5, 30)]
    engine = Engine(model, rows=3)
    completions = engine.generate(requests)
    assert engine.prefill.prefix[:70] == shared
    assert [c.ids for c in completions] == [recomputed(model, r.prompt, 6) for r in requests]


def test_a_long_prompt_is_prefilled_in_pieces(model, recomputed):
    engine = Engine(model, rows=1)
    engine.prefill.tokens = 16
    request = Request(prompt(100), 5)
    assert engine.generate([request])[0].ids == recomputed(model, request.prompt, 5)


def test_output_does_not_depend_on_the_other_rows(model):
    """Alone, in a batch of four and of nine, greedy and sampled, first and last in the queue."""
    mixed = [
        Request(prompt(5 + 7 * i, seed=i), 4 + 5 * i, temperature=0.0 if i % 2 else 0.9, top_k=i % 3 * 10, seed=i)
        for i in range(9)
    ]
    alone = [Engine(model, rows=1).generate([request])[0].ids for request in mixed]
    assert [c.ids for c in Engine(model, rows=4).generate(mixed)] == alone
    assert [c.ids for c in Engine(model, rows=9).generate(mixed)] == alone
    assert [c.ids for c in Engine(model, rows=4).generate(mixed[::-1])][::-1] == alone


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 130), st.integers(1, 20)), min_size=1, max_size=8),
    st.integers(1, 6),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([0, 1, 2]),
    st.lists(st.integers(0, VOCAB - 1), max_size=3),
)
def test_any_mixture_of_lengths_equals_recompute(model, recomputed, sizes, rows, burst, ahead, stops):
    """Whatever the lengths, the number of rows, how often the host looks and how far the device is then; every other row may stop."""
    requests = [Request(prompt(size, seed=i), new, stop_ids=stops[: i % 2 * 3]) for i, (size, new) in enumerate(sizes)]
    engine = Engine(model, rows=rows)
    engine.burst, engine.ahead = burst, ahead
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        whole = recomputed(model, request.prompt, request.max_new_tokens)
        stop = next((i for i, token in enumerate(whole) if token in request.stop_ids), None)
        assert completion.ids == whole[:stop]
        assert completion.stop_reason == ("length" if stop is None else "stop")


def test_an_engine_used_before_gives_the_same(model):
    """Nothing of an earlier request is left in a row that is used again."""
    engine, request = Engine(model, rows=2), Request(prompt(9), 20, temperature=1.0, seed=3)
    first = engine.generate([request])[0].ids
    engine.generate([Request(prompt(140, seed=5), 15), Request(prompt(40, seed=6), 100)])
    assert engine.generate([request])[0].ids == first


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_stream_left_half_way_leaves_the_engine_usable(model, recomputed, ahead):
    engine, request = Engine(model, rows=2), Request(prompt(9), 20)
    engine.ahead = ahead
    stream = engine.stream(request)
    first = [next(stream) for _ in range(3)]
    stream.close()
    assert engine.generate([request])[0].ids[:3] == first
    assert list(engine.stream(request)) == recomputed(model, request.prompt, 20)


def test_generation_ends_before_a_stop_token(model, recomputed):
    whole = recomputed(model, prompt(8), 30)
    stop = whole[11]
    expected = whole[: whole.index(stop)]
    completion = Engine(model, rows=1).generate([Request(prompt(8), 30, stop_ids=[stop])])[0]
    assert (completion.ids, completion.stop_reason) == (expected, "stop")


def test_bursts_change_nothing(model):
    """On a GPU the host looks every 16 steps only: what a row draws behind its stop token must not show."""
    requests = [Request(prompt(3 + i, seed=i), 5 + 4 * i, temperature=1.0, seed=i, stop_ids=[7, 50]) for i in range(12)]
    single = Engine(model, rows=3).generate(requests)
    for burst, ahead in ((16, 0), (16, 1), (8, 1), (1, 3)):
        engine = Engine(model, rows=3)
        engine.burst, engine.ahead = burst, ahead
        assert engine.generate(requests) == single


class Replayed:
    """What stands for a captured graph on a CPU: run once at its capture, as capture does, and at each replay."""

    def __init__(self, work):
        self.work, self.result = work, work()

    def replay(self) -> None:
        again = self.work()
        if again is not None:
            self.result.copy_(again)


@pytest.mark.parametrize(("burst", "ahead"), [(16, 0), (64, 0), (8, 1)])
def test_captures_change_nothing(model, recomputed, monkeypatch, burst, ahead):
    """Lengths that are no multiple of the steps captured in a row: what is captured in between must not touch what was drawn."""
    monkeypatch.setattr(decoder, "captured", lambda work, pool: ((graph := Replayed(work)), graph.result))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    engine = Engine(model, rows=3, graphs=True)
    engine.burst, engine.ahead = burst, ahead
    for new in (13, 24, 7, 1, 31):
        requests = [Request(prompt(5 + i, seed=i), new - i % 2) for i in range(5) if new > i % 2]
        for request, completion in zip(requests, engine.generate(requests), strict=True):
            assert completion.ids == recomputed(model, request.prompt, request.max_new_tokens)


def test_a_burst_lasts_until_fewer_rows_can_be_decoded(model, monkeypatch):
    """With nothing to look for on the way: neither do rows idle behind their end, nor does the host look without need."""
    engine, runs = Engine(model, rows=4), []
    engine.burst = 2
    run = engine.decoder.run
    monkeypatch.setattr(
        engine.decoder, "run", lambda steps, rows, *more: (runs.append((steps, rows)), run(steps, rows, *more))
    )
    engine.generate([Request(prompt(5, seed=n), n) for n in (10, 20, 50, 60)])
    assert runs == [(19, 4), (30, 2), (10, 1)]


@pytest.mark.parametrize(("waiting", "expected"), [(0, [(0, 3)]), (3, [])])
def test_rows_move_only_when_that_leaves_fewer_of_them(model, recomputed, monkeypatch, waiting, expected):
    """Three of four rows stop together: the last one becomes the first, but not when others take the rows at once."""
    engine, moves = Engine(model, rows=4), []
    move = engine.state.move
    monkeypatch.setattr(engine.state, "move", lambda pairs: (moves.extend(pairs), move(pairs)))
    whole = [recomputed(model, prompt(5, seed=i), 8) for i in range(4 + waiting)]
    stops = [ids[2:3] if i < 3 else [] for i, ids in enumerate(whole)]
    requests = [Request(prompt(5, seed=i), 8, stop_ids=ids) for i, ids in enumerate(stops)]
    for ids, stop, completion in zip(whole, stops, engine.generate(requests), strict=True):
        assert completion.ids == (ids[: ids.index(stop[0])] if stop else ids)
    assert [pair for pair in moves if pair[1] == 3] == expected


def test_seeds_reproduce_and_samples_differ(model):
    request = Request(prompt(6), 12, temperature=1.0, seed=11, samples=8)
    first, second = (Engine(model, rows=rows).generate([request]) for rows in (8, 3))
    assert [c.ids for c in first] == [c.ids for c in second]
    assert len({tuple(c.ids) for c in first}) == 8


def test_bad_requests_get_an_error_and_the_others_go_on(model, recomputed):
    good = Request(prompt(10), 8)
    bad = {
        "prompt: empty": Request([], 5),
        f"prompt: token id {VOCAB} is outside the vocabulary of {VOCAB}": Request([1, VOCAB], 5),
        "prompt: token id -1 is outside": Request([-1], 5),
        "prompt: 160 tokens leave no room in a context of 160": Request(prompt(160), 1),
        "max_new_tokens = 151: with the 10 tokens of the prompt longer than the context of 160. At most 150": Request(
            prompt(10), 151
        ),
        "max_new_tokens = 0": Request([1], 0),
        "temperature = -0.5": Request([1], 5, temperature=-0.5),
        "temperature = nan": Request([1], 5, temperature=float("nan")),
        "top_p = 0": Request([1], 5, top_p=0),
        "top_k = -1": Request([1], 5, top_k=-1),
        "stop_ids: 9 given": Request([1], 5, stop_ids=range(9)),
    }
    engine = Engine(model, rows=2)
    completions = engine.generate([good, *bad.values(), good])
    assert completions[0].ids == completions[-1].ids == recomputed(model, good.prompt, 8)
    for message, completion in zip(bad, completions[1:-1], strict=True):
        assert completion.stop_reason == "error"
        assert message in completion.error
    with pytest.raises(UserError, match="prompt: empty"):
        list(engine.stream(Request([], 5)))


def test_more_rows_than_fit_are_refused_before_allocation(model):
    with pytest.raises(UserError, match=r"At most \d+ rows fit"):
        Engine(model, rows=10**10)


def test_memory_stays_flat(model):
    """All the tensors of an engine exist before its first request."""
    engine = Engine(model, rows=4)

    def storages() -> set[int]:
        tensors = [*engine.cache.keys, *engine.cache.values, *engine.prefill.scratch.keys, engine.state.token]
        return {tensor.data_ptr() for tensor in tensors}

    before = storages()
    for seed in range(30):
        engine.generate([Request(prompt(5, seed), 3), Request(prompt(50, seed), 2, temperature=1.0)])
    assert storages() == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_stays_flat_over_ten_thousand_requests(tiny_model):
    """Good and bad ones, greedy and sampled, with and without a shared prefix."""
    model = tiny_model(depth=1)
    engine = Engine(model, rows=64)

    def thousand(seed: int) -> None:
        requests = [Request(prompt(1 + i % 7, seed + i), 1 + i % 3, temperature=i % 2, seed=i) for i in range(990)]
        engine.generate(requests + [Request([VOCAB], 1)] * 10)

    thousand(0)
    before = resident_bytes()
    for batch in range(1, 10):
        thousand(1000 * batch)
    assert resident_bytes() - before < 16 * 2**20


@pytest.mark.parametrize(("burst", "ahead"), [(1, 0), (2, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("place", [0, 10])
def test_a_freed_row_is_taken_by_the_next_request_at_once(model, monkeypatch, burst, ahead, place):
    """Ten short requests pass through one row while a long one keeps the other: no step is added for them, nor for it, however far
    the device is ahead of the host."""
    engine, steps = Engine(model, rows=2), []
    engine.burst, engine.ahead = burst, ahead
    run = engine.decoder.run
    monkeypatch.setattr(engine.decoder, "run", lambda count, *rest: steps.append(count) or run(count, *rest))
    requests = [Request(prompt(5, i), 4) for i in range(10)]
    requests.insert(place, Request(prompt(5, 10), 41))
    engine.generate(requests)
    assert sum(steps) == 40


def test_the_device_has_work_while_the_first_tokens_are_handed_out(model, recomputed, monkeypatch):
    engine, launched = Engine(model, rows=1), []
    run = engine.decoder.run
    monkeypatch.setattr(engine.decoder, "run", lambda count, *rest: launched.append(count) or run(count, *rest))
    stream = engine.stream(Request(prompt(8), 5))
    ids = [next(stream)]
    assert launched == [1]
    assert ids + list(stream) == recomputed(model, prompt(8), 5)
    assert list(engine.stream(Request(prompt(8), 1))) == ids
    assert launched == [1, 1, 1, 1]  # nothing for a row that has all its tokens


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_host_looks_at_a_burst_while_the_next_is_under_way(model, recomputed, monkeypatch, ahead):
    engine, launched = Engine(model, rows=1), []
    engine.burst, engine.ahead = 3, ahead
    run = engine.decoder.run
    monkeypatch.setattr(engine.decoder, "run", lambda count, *rest: launched.append(count) or run(count, *rest))
    whole = recomputed(model, prompt(8), 11)
    never = min(set(range(VOCAB)) - set(whole))  # to be looked for all the same
    ids, seen = [], []
    for token in engine.stream(Request(prompt(8), 11, stop_ids=[never])):
        ids.append(token)
        seen.append(sum(launched))
    assert ids == whole
    read = [0, *[3] * 3, *[6] * 3, *[9] * 3, 10]  # steps whose tokens have been handed out
    assert seen == [min(10, so_far + 3 * (1 if i == 0 else ahead)) for i, so_far in enumerate(read)]


@pytest.mark.parametrize("burst", [1, 16])
def test_a_row_that_its_first_token_ends_leaves_the_others_theirs(model, recomputed, burst):
    """The steps that were launched behind that token were none of its own."""
    whole = [recomputed(model, prompt(8, seed=i), 20) for i in range(6)]
    requests = [Request(prompt(8, seed=i), 20, stop_ids=ids[:1] if i % 2 else ()) for i, ids in enumerate(whole)]
    engine = Engine(model, rows=3)
    engine.burst = burst
    completions = engine.generate(requests)
    assert [c.ids for c in completions] == [[] if i % 2 else ids for i, ids in enumerate(whole)]
    assert [c.stop_reason for c in completions] == ["length", "stop"] * 3


def test_samples_of_one_prompt_are_prefilled_once(model, monkeypatch):
    engine, fed = Engine(model, rows=8), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: fed.append(tokens.numel()) or hidden(tokens, *rest))
    engine.generate([Request(prompt(50), 1, temperature=1.0, samples=8)])
    assert fed == [50]


def test_a_wrong_position_is_noticed(model):
    """The parity tests can fail: a key stored one place too far changes what is decoded."""
    cache = KVCache(model.config, 1, 64, model.device, torch.float32)
    ids = prompt(20)
    with torch.no_grad():
        model(torch.tensor([ids]), positions=torch.arange(1, 21)[None], cache=cache)
        wrong = model(torch.tensor([[5]]), positions=torch.tensor([[21]]), cache=cache)[0, -1]
        right = model(torch.tensor([[*ids, 5]]), last_only=True)[0, -1]
    assert not torch.allclose(wrong, right, atol=1e-3)


def test_logprobs_are_those_of_a_full_pass(model):
    contexts = [prompt(n, seed=n) for n in (1, 17, 17, 40, 90)]
    pairs = [(context, prompt(k, seed=100 + i)) for i, context in enumerate(contexts) for k in (1, 1, 6)]
    for (context, continuation), scored in zip(pairs, Engine(model, rows=1).logprobs(pairs), strict=True):
        with torch.no_grad():
            table = model(torch.tensor([context + continuation])).log_softmax(-1)[0, len(context) - 1 : -1]
        expected = table[range(len(continuation)), continuation]
        assert scored.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert scored.logprob == pytest.approx(float(expected.sum()), abs=1e-4)
        assert scored.greedy == (table.argmax(-1).tolist() == continuation)


def test_logprobs_refuse_what_has_no_meaning(model):
    engine = Engine(model, rows=1)
    with pytest.raises(UserError, match="at least one token"):
        engine.logprobs([([], [1])])
    with pytest.raises(UserError, match="more than the context of 160"):
        engine.logprobs([(prompt(160), [1, 2])])

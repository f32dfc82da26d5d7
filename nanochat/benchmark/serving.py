"""What a sweep over equal rows does not show: mixed lengths, a deep model, a long prompt, and what capturing costs."""

import dataclasses
import random
import statistics
import time
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F

from nanochat.benchmark.roofline import Rates, cached_step, recomputed_step
from nanochat.benchmark.timing import repeat, seconds_of
from nanochat.infer.decoder import captured
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.model.gpt import GPT
from nanochat.model.kernels import causal_attention
from nanochat.progress import say

FACTS = ("capture", "mixed", "long_prompt", "deep")
MIXED_REQUESTS, MIXED_PROMPT, MIXED_NEW = 512, (10, 500), (10, 400)
MIXED_ROWS = 93
LONG_PROMPT = 2048
DEEP = {"depth": 20, "width": 1280, "heads": 10, "kv_heads": 10}


def measure(model: GPT, rates: Rates, seed: int, only: Collection[str] = ()) -> Iterator[tuple[str, dict]]:
    """The FACTS of kv_cache.json, one by one. only: of them these alone; empty: all."""
    measurements = (
        lambda: capture_seconds(model, MIXED_ROWS, 256),
        lambda: mixed(model, seed),
        lambda: long_prompt(model, rates, seed),
        lambda: deep(model, rates, seed),
    )
    for name, measured in zip(FACTS, measurements, strict=True):
        if only and name not in only:
            continue
        found = measured()
        say("benchmark kv_cache", f"{name}: " + ", ".join(f"{key} {value:.5g}" for key, value in found.items()))
        yield name, found


def mixed(model: GPT, seed: int, requests: int = MIXED_REQUESTS, rows: int = MIXED_ROWS) -> dict:
    """Requests of random lengths against as many of their mean lengths, through the same rows."""
    source, vocab_size = random.Random(seed), model.config.vocab_size
    length = min(MIXED_PROMPT[1] + MIXED_NEW[1], model.cos.size(0))
    prompt_limit = min(MIXED_PROMPT[1], length * 5 // 9)
    new_limit = min(MIXED_NEW[1], length - prompt_limit)

    def request(prompt: int, new: int) -> Request:
        return Request([source.randrange(vocab_size) for _ in range(prompt)], new)

    varied = [
        request(source.randint(MIXED_PROMPT[0], prompt_limit), source.randint(MIXED_NEW[0], new_limit))
        for _ in range(requests)
    ]
    mean_prompt = round(statistics.mean(len(one.prompt) for one in varied))
    mean_new = round(statistics.mean(one.max_new_tokens for one in varied))
    uniform = [request(mean_prompt, mean_new) for _ in range(requests)]
    engine = Engine(model, rows=rows, length=length)
    first = seconds_of(lambda: engine.generate(varied), model.device)
    found = {"requests": requests, "rows": rows, "first_run_seconds": first}
    for name, some in (("uniform", uniform), ("mixed", varied)):
        seconds = statistics.median(repeat(lambda some=some: engine.generate(some), model.device, 3, 10.0))
        found[f"{name}_tokens_per_second"] = sum(one.max_new_tokens for one in some) / seconds
    return found | {"fraction": found["mixed_tokens_per_second"] / found["uniform_tokens_per_second"]}


def long_prompt(model: GPT, rates: Rates, seed: int) -> dict:
    """Time to the first token of one long prompt, over the time that its operations take at the measured rate.

    pass_seconds       of it, the captured pass alone; the rest is the host's, and drawing the token
    products_seconds   of the pass, what the layers' products take by themselves, as the library does them
    attention_seconds  and their attention
    """
    length = min(LONG_PROMPT, model.cos.size(0) - 1)
    prompt = random.Random(seed).choices(range(model.config.vocab_size), k=length)
    engine = Engine(model, rows=1, length=length + 1)
    seconds = statistics.median(repeat(lambda: engine.generate([Request(prompt, 1)]), model.device, 10, 5.0, warmup=2))
    floor = recomputed_step(model, 1, length).flops / rates.matmul_flops_per_second
    found = {"prompt_tokens": length, "seconds": seconds, "floor_seconds": floor, "over_floor": seconds / floor}
    for graph, _ in engine.prefill.fused.captured.values() if engine.prefill.fused else ():
        found["pass_seconds"] = statistics.median(repeat(graph.replay, model.device, 20, 2.0))
    return found | seconds_of_libraries(model, length)


@torch.no_grad()
def seconds_of_libraries(model: GPT, tokens: int) -> dict:
    """What the libraries' kernels that a pass over one prompt stands on take alone: no pass with them is faster.

    Of the last layer's products only queries, keys and values: past those there is one token left.
    """
    heads, dtype, device = model.config.heads, model.compute_dtype, model.device
    kv_heads, head_dim = model.config.kv_heads, model.config.width // heads
    layers = [(b.attention.qkv, b.attention.out, b.mlp.up, b.mlp.down) for b in model.blocks]
    products = [linear.weight.to(dtype) for layer in layers for linear in layer][:-3]
    inputs = {n: torch.randn(tokens, n, device=device, dtype=dtype) for n in {w.size(1) for w in products}}
    queries, keys, values = (
        torch.randn(1, n, tokens, head_dim, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads)
    )

    def multiply() -> None:
        for weight in products:
            F.linear(inputs[weight.size(1)], weight)

    def attend() -> None:
        for block in model.blocks[:-1]:
            causal_attention(queries, keys, values, block.attention.window)

    found = {}
    for name, work in (("products_seconds", multiply), ("attention_seconds", attend)):
        run = captured(work, None)[0].replay if device.type == "cuda" else work
        found[name] = statistics.median(repeat(run, device, 20, 2.0))
    return found


def deep(model: GPT, rates: Rates, seed: int, new_tokens: int = 200) -> dict:
    """A model of 20 layers of 1,280 at one row. Its weights are random, and all that its time depends on is their size."""
    larger = GPT(dataclasses.replace(model.config, **DEEP))
    larger.compute_dtype = model.compute_dtype
    for parameter in larger.parameters():
        parameter.data = torch.empty(parameter.shape, device=model.device, dtype=model.head.dtype).normal_(0, 0.02)
        parameter.requires_grad_(False)
    larger = larger.to(model.device)
    prompt = random.Random(seed).choices(range(model.config.vocab_size), k=50)
    engine = Engine(larger, rows=1, length=50 + new_tokens)
    seconds = statistics.median(repeat(lambda: engine.generate([Request(prompt, new_tokens)]), model.device, 5, 5.0))
    prefill = statistics.median(repeat(lambda: engine.generate([Request(prompt, 1)]), model.device, 5, 2.0))
    step = (seconds - prefill) / (new_tokens - 1)
    floor = cached_step(larger, 1, 50 + new_tokens / 2).bytes / rates.copy_bytes_per_second
    return {
        "tokens_per_second": new_tokens / seconds,
        "ms_per_step": 1000 * step,
        "floor_fraction": floor / step,
        **DEEP,
    }


def capture_seconds(model: GPT, rows: int, length: int) -> dict:
    """Serving every number of rows with a new engine, twice since prefill is captured at its second use: what is captured on the way,
    and how long all of it takes."""
    engine = Engine(model, rows=rows, length=length)
    started = time.perf_counter()
    for size in (*engine.row_buckets, *engine.row_buckets):
        engine.generate([Request([1 + i] * (length // 4), length // 4) for i in range(size)])
    graphs = len(engine.decoder.steps) + len(engine.decoder.beginnings)
    graphs += len(engine.prefill.fused.captured) if engine.prefill.fused else 0
    return {"seconds": time.perf_counter() - started, "graphs": graphs}

"""Are the first tokens of many samples of one prompt independent draws?

`before` is the study's "token broadcasting" bug: the prompt is prefilled once, one first token is drawn from its logits, and
all rows start with it. `after` is the engine. A chi-squared test holds the draws against the distribution of the logits that they
were drawn from. The engine computes those by kernels of its own: how far they are from the plain model's is a column beside it, since
4,096 draws would show bfloat16's rounding as well.
"""

import torch

from nanochat.benchmark.chi_squared import chi_squared
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import RowSampling, Sampling, sample
from nanochat.model.gpt import GPT


@torch.no_grad()
def distribution(model: GPT, prompt: list[int]) -> torch.Tensor:
    """The model's probabilities of the first token after the prompt, (V,) float64 on the CPU, without a cache."""
    logits = model(torch.tensor([prompt], device=model.device), last_only=True)[0, -1]
    return logits.double().softmax(-1).cpu()


@torch.no_grad()
def broadcast_first_tokens(model: GPT, prompt: list[int], samples: int, seed: int) -> torch.Tensor:
    """The bug: one draw, copied to all rows. (samples,) int64."""
    logits = model(torch.tensor([prompt], device=model.device), last_only=True)[:, -1]
    rows = RowSampling.of([Sampling(temperature=1.0, seed=seed)], model.device)
    one = sample(logits, rows, torch.zeros(1, dtype=torch.int64, device=model.device))
    return one.expand(samples).cpu()


def engine_first_tokens(engine: Engine, prompt: list[int], samples: int, seed: int) -> torch.Tensor:
    """What the engine gives the samples of one request. (samples,) int64."""
    completions = engine.generate([Request(prompt, 1, temperature=1.0, seed=seed, samples=samples)])
    return torch.tensor([completion.ids[0] for completion in completions])


@torch.no_grad()
def engine_distribution(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """`distribution` by the engine's own prefill. The engine must be idle: its first row is overwritten."""
    return engine.prefill([prompt], [[0]])[0].double().softmax(-1).cpu()


def measure(engine: Engine, prompt: list[int], samples: int, seed: int) -> list[dict]:
    """The rows of benchmark/first_token.json."""
    plain, own = distribution(engine.model, prompt), engine_distribution(engine, prompt)
    draws = {
        "before": (broadcast_first_tokens(engine.model, prompt, samples, seed), plain),
        "after": (engine_first_tokens(engine, prompt, samples, seed), own),
    }
    rows = []
    for case, (tokens, expected) in draws.items():
        test = chi_squared(tokens, expected)
        rows.append(
            {
                "case": case,
                "samples": samples,
                "distinct": int(tokens.unique().numel()),
                "chi2": test.chi2,
                "degrees_of_freedom": test.degrees,
                "p_value": test.p_value,
                "total_variation": float((expected - plain).abs().sum() / 2),
            }
        )
    return rows

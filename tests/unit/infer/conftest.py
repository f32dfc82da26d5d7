import pytest
import torch

from nanochat.config import ADDITIONS
from nanochat.model.gpt import GPT, GPTConfig

VOCAB = 97


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are no faster on two cores, and much slower when the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_model(
    seed: int = 0,
    depth: int = 3,
    kv_heads: int = 2,
    length: int = 160,
    vocab: int = VOCAB,
    additions: tuple[str, ...] = ADDITIONS,
) -> GPT:
    """Random weights everywhere: with the real start the blocks add nothing and a broken cache would go unnoticed."""
    config = GPTConfig(
        vocab,
        depth,
        32,
        4,
        kv_heads,
        logit_softcap=15.0,
        rope_base=10_000.0,
        sequence_length=length,
        additions=additions,
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name in ("embedding", "head") else 0.4
            parameter.copy_(torch.empty(parameter.shape).normal_(0, scale, generator=generator))
    return model.eval()


@torch.no_grad()
def recompute(model: GPT, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding without any cache: the definition that the engine must meet."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]), last_only=True)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def tiny_model():
    """The builder of tiny models."""
    return build_model


@pytest.fixture(scope="session")
def recomputed():
    """The decoder without a cache."""
    return recompute


@pytest.fixture(scope="session")
def model() -> GPT:
    return build_model()

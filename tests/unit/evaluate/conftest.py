import pytest
import torch

from nanochat.data.tokenizer import Tokenizer
from nanochat.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are no faster on two cores, and much slower when the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token for each byte, and the special ones."""
    return Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(scope="session")
def build_model():
    """A builder of tiny models with random weights in every matrix."""

    def build(vocab_size: int, length: int = 48) -> GPT:
        model = GPT(GPTConfig(vocab_size, 2, 32, 4, 4, logit_softcap=15.0, rope_base=10_000.0, sequence_length=length))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.4, generator=generator))
        return model.eval()

    return build

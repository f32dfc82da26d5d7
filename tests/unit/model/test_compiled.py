"""The compiled model learns what the eager one does.

A custom gradient whose saved tensors were written in place came out as zeros from torch 2.11's compiler: the loss was right and
nothing was learnt.
"""

import shutil

import pytest
import torch

from nanochat.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    vocab_size=512, depth=2, width=64, heads=2, kv_heads=1, logit_softcap=15.0, rope_base=1e4, sequence_length=64
)


def loss_and_gradients(device: str, compiled: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # the blocks start silent: give them something to learn from
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.to(device)
    tokens = torch.randint(0, 512, (4, 64), generator=generator).to(device)
    targets = torch.where(torch.rand(4, 64, generator=generator) < 0.3, -1, tokens.cpu().roll(-1, 1)).to(device)
    loss = (torch.compile(model, dynamic=False) if compiled else model)(tokens, targets, reduction="sum")
    loss.backward()
    return loss.item(), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_compiled_gradients_equal_eager_ones(device):
    if device == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    eager_loss, eager = loss_and_gradients(device, compiled=False)
    loss, compiled = loss_and_gradients(device, compiled=True)
    assert loss == pytest.approx(eager_loss, rel=1e-4)
    for name, gradient in eager.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(
            compiled[name], gradient, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )

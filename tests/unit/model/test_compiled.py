"""The compiled model learns what the eager one does, with the kernels of a GPU too.

A custom gradient whose saved tensors were written in place came out as zeros from torch 2.11's compiler: the loss was right and
nothing was learnt.
"""

import dataclasses
import functools
import shutil
import weakref

import pytest
import torch

from nanochat.config import ADDITIONS
from nanochat.model import attention, compiled, gpt, kernels, loss
from nanochat.model.compiled import CompiledLoss
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.kernels import fused, only_kernels

LENGTH = 16
CONFIG = GPTConfig(
    vocab_size=512,
    depth=2,
    width=64,
    heads=2,
    kv_heads=1,
    logit_softcap=15.0,
    rope_base=1e4,
    sequence_length=LENGTH,
    additions=ADDITIONS,
)
# The shortest that blocks are skipped in, and layers with and without each of the two: value embedding, window.
WINDOWED = dataclasses.replace(CONFIG, depth=5, sequence_length=256, window=0)


def random_model(config: GPTConfig, generator: torch.Generator) -> GPT:
    model = GPT(config)
    model.init_weights(generator)
    with torch.no_grad():  # the blocks and the smear start silent: give them something to learn from
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def loss_and_gradients(
    device: torch.device, wrap=lambda model: model, config: GPTConfig = CONFIG
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Training loss, evaluation loss, gradients."""
    generator = torch.Generator().manual_seed(0)
    model = random_model(config, generator).to(device)
    shape = (4, config.sequence_length)
    tokens = torch.randint(0, 512, shape, generator=generator)
    targets = torch.where(torch.rand(shape, generator=generator) < 0.3, -1, tokens.roll(-1, 1)).to(device)
    forward = wrap(model)
    total = forward(tokens.to(device), targets, reduction="sum")
    total.backward()
    with torch.no_grad():
        evaluated = forward(tokens.to(device), targets, reduction="none").sum()
    return total.item(), evaluated.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}


def assert_same(found, expected) -> None:
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    for name, gradient in expected[2].items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(
            found[2][name], gradient, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture
def torch_and_kernels(monkeypatch, kernel_device):
    """What torch's own operations give on the device; from here on the Triton kernels are used, on a CPU too."""
    with only_kernels():
        expected = loss_and_gradients(kernel_device)
    if kernel_device.type == "cpu":
        for module in (attention, loss, gpt):
            monkeypatch.setattr(module, "fused", lambda kernel, x: True)
    return kernel_device, expected


def test_kernels_learn_what_torch_does(torch_and_kernels):
    device, expected = torch_and_kernels
    assert_same(loss_and_gradients(device), expected)


def compiler_of(device: torch.device) -> None:
    if device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [CompiledLoss, lambda model: torch.compile(model, dynamic=False)], ids=["blocks", "whole"]
)
def test_compiled_kernels_learn_what_torch_does(torch_and_kernels, wrap):
    device, expected = torch_and_kernels
    compiler_of(device)
    assert_same(loss_and_gradients(device, wrap), expected)


@pytest.mark.slow
def test_compiled_gradients_equal_eager_ones_on_a_cpu():
    cpu = torch.device("cpu")
    compiler_of(cpu)
    assert_same(loss_and_gradients(cpu, CompiledLoss), loss_and_gradients(cpu))


@pytest.mark.slow
def test_compiled_windows_learn_what_eager_ones_do_on_a_cpu():
    cpu, config = torch.device("cpu"), dataclasses.replace(WINDOWED, depth=3)
    compiler_of(cpu)
    assert_same(loss_and_gradients(cpu, CompiledLoss, config), loss_and_gradients(cpu, config=config))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_windows_learn_what_eager_ones_do_on_a_gpu():
    device = torch.device("cuda")
    compiler_of(device)
    with only_kernels():
        expected = loss_and_gradients(device, config=WINDOWED)
    assert_same(loss_and_gradients(device, CompiledLoss, WINDOWED), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_each_kind_of_block_is_compiled_once_a_shape(monkeypatch):
    """Captured as on a GPU, with blocks that are skipped, but run eagerly; more graphs of a block than torch's own limit."""
    torch.compiler.reset()
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        compiled, "window_blocks", lambda length, window, _, device: window and kernels._blocks(length, window, device)
    )
    generator = torch.Generator().manual_seed(0)
    model = random_model(WINDOWED, generator).requires_grad_(False)  # on a CPU FlexAttention has no gradient
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=8):
        forward = CompiledLoss(model)
        for rows in (4, 3, 2):
            tokens = torch.randint(0, 512, (rows, WINDOWED.sequence_length), generator=generator)
            torch.testing.assert_close(forward(tokens, tokens), model(tokens, tokens))
    # The first block, four kinds of others, the last norm.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3 * 6


def test_a_validation_keeps_nothing_for_a_gradient(monkeypatch):
    """It runs the graphs of training; they, and with them what they save, are gone when the loss is computed."""
    torch.compiler.reset()
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = random_model(CONFIG, torch.Generator().manual_seed(0))
    forward, tokens = CompiledLoss(model), torch.zeros(1, CONFIG.sequence_length, dtype=torch.long)
    run_block, loss_of, graphs, at_the_loss = forward._next, model.loss, [], []

    def block(*arguments):
        results = run_block(*arguments)
        graphs.append(weakref.ref(results[0].grad_fn))
        return results

    def loss(*arguments):
        at_the_loss.append(sum(graph() is not None for graph in graphs))
        return loss_of(*arguments)

    monkeypatch.setattr(forward, "_next", block)
    monkeypatch.setattr(model, "loss", loss)
    with torch.no_grad():
        forward(tokens, tokens)
    forward(tokens, tokens)
    assert at_the_loss == [0, CONFIG.depth - 1]


@pytest.mark.slow
def test_one_compilation_serves_all_blocks():
    compiler_of(torch.device("cpu"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loss_and_gradients(torch.device("cpu"), CompiledLoss)
    # The first block with the embedding, the others, the last norm: a validation runs the graphs of training.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3


def test_kernels_are_switched_off_one_by_one():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.zeros(2, 8, dtype=torch.bfloat16, device=device)
    before = {name: fused(name, x) for name in ("loss", "projection", "mlp")}
    with only_kernels("loss"):
        assert fused("loss", x) == before["loss"]
        assert not fused("projection", x)
        with only_kernels():
            assert not fused("loss", x)
        assert fused("loss", x) == before["loss"]
    assert {name: fused(name, x) for name in before} == before

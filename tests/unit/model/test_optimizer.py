"""Muon makes matrices orthogonal, and state does not depend on how matrices are batched."""

import dataclasses

import pytest
import torch

from nanochat import config
from nanochat.config import Model
from nanochat.errors import UserError
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optimizer import Optimizer, momentum_at, orthogonalize

SIZES = GPTConfig.from_settings(Model(depth=2, width=32, head_dim=8, kv_heads=2), vocab_size=50, sequence_length=16)


def model_with_gradients(seed: int = 0) -> GPT:
    model = GPT(SIZES)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty(parameter.shape).normal_(generator=generator)
    return model


@pytest.mark.parametrize("shape", [(3, 24, 64), (2, 64, 24), (1, 16, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, dtype):
    matrices = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
    assert values.min() > 0.7
    assert values.max() < 1.25


def test_orthogonalizing_keeps_the_singular_vectors():
    matrix = torch.empty(1, 20, 30).normal_(generator=torch.Generator().manual_seed(3))
    left, _, right = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = left.T @ orthogonalize(matrix, torch.float32)[0] @ right.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


def test_batched_updates_equal_those_of_each_matrix_alone():
    settings = config.Optimizer(momentum=0.0)
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    Optimizer(model, settings, torch.float32).step(0, 1.0)
    weights = dict(model.named_parameters())
    down = "blocks.1.mlp.down.weight"
    expected = before[down] - settings.matrix_learning_rate * orthogonalize(gradients[down][None], torch.float32)[0]
    torch.testing.assert_close(weights[down], expected, rtol=1e-4, atol=1e-5)
    # The keys' rows of the fused projection are a matrix of their own.
    qkv = "blocks.0.attention.qkv.weight"
    expected = before[qkv][32:48] - 0.02 * orthogonalize(gradients[qkv][None, 32:48], torch.float32)[0]
    torch.testing.assert_close(weights[qkv][32:48], expected, rtol=1e-4, atol=1e-5)


def test_state_goes_through_names():
    one, other = model_with_gradients(), model_with_gradients()
    first, second = Optimizer(one, config.Optimizer()), Optimizer(other, config.Optimizer())
    first.step(0, 1.0)
    second.step(0, 1.0)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert state["blocks.0.attention.qkv.weight.momentum"].shape == one.blocks[0].attention.qkv.weight.shape
    restored = Optimizer(other, config.Optimizer())
    restored.load_state_dict(state)
    first.step(1, 0.5)
    restored.step(1, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    state = Optimizer(model_with_gradients(), config.Optimizer()).state_dict()
    deeper = GPT(dataclasses.replace(SIZES, depth=3))
    deeper.init_weights(torch.Generator().manual_seed(0))
    for bad in (state, state | {"blocks.9.mlp.up.weight.momentum": torch.zeros(1)}):
        with pytest.raises(UserError, match="another model"):
            Optimizer(deeper, config.Optimizer()).load_state_dict(bad)


def test_gradients_and_weights_are_views_that_the_model_keeps_using():
    model = model_with_gradients()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, config.Optimizer())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    norms = torch.stack([gradient.norm() for gradient in gradients.values()])
    torch.testing.assert_close(optimizer.reduce_gradients().sqrt().float(), norms.norm())
    optimizer.zero_gradients()
    assert all(not p.grad.any() for p in model.parameters())
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model(tokens, tokens).backward()
    assert optimizer.reduce_gradients() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_step_that_is_not_ok_changes_neither_weights_nor_state(value):
    """Also when its gradient is finite: the loss was not."""
    settings = config.Optimizer(weight_decay=0.1)
    model, undisturbed = model_with_gradients(), model_with_gradients()
    optimizer, other = Optimizer(model, settings), Optimizer(undisturbed, settings)
    ok = torch.tensor(True)
    optimizer.step(0, 1.0)
    other.step(0, 1.0)
    model.head.grad.fill_(value)
    model.blocks[0].attention.qkv.weight.grad.fill_(value)
    weights = [p.detach().clone() for p in model.parameters()]
    state = optimizer.state_dict()
    optimizer.step(1, 1.0, gradient_scale=torch.tensor(value), ok=~ok)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state())
    for one, another in ((model, optimizer), (undisturbed, other)):
        generator = torch.Generator().manual_seed(5)
        for parameter in one.parameters():
            parameter.grad.normal_(generator=generator)
        another.step(2, 1.0, ok=ok)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))


def test_scaling_the_gradients_is_as_if_they_had_been_larger():
    one, other = model_with_gradients(), model_with_gradients()
    first, second = Optimizer(one, config.Optimizer()), Optimizer(other, config.Optimizer())
    for step in range(2):
        for model, factor in ((one, 1.0), (other, 4.0)):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad.normal_(generator=generator).mul_(factor)
        first.step(step, 1.0, gradient_scale=torch.tensor(4.0))
        second.step(step, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_update_is_the_eager_one():
    models = [model_with_gradients().cuda() for _ in range(2)]
    optimizers = [Optimizer(model, config.Optimizer(), torch.float32, compile=i > 0) for i, model in enumerate(models)]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator("cuda").manual_seed(step)
            for parameter in model.parameters():
                parameter.grad.normal_(generator=generator)
            optimizer.step(step, 1.0, ok=torch.tensor(step != 1, device="cuda"))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_learning_rates_follow_the_width():
    optimizer = Optimizer(model_with_gradients(), config.Optimizer())
    assert optimizer.adam_rates["head"] == pytest.approx(0.004 * (768 / 32) ** 0.5)


def test_momentum_warms_up():
    assert momentum_at(0, 0.95) == 0.85
    assert momentum_at(300, 0.95) == momentum_at(10_000, 0.95) == pytest.approx(0.95)
    assert momentum_at(0, 0.5) == 0.5

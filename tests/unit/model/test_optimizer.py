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


def test_learning_rates_follow_the_width():
    optimizer = Optimizer(model_with_gradients(), config.Optimizer())
    assert optimizer.adam_rates["head"] == pytest.approx(0.004 * (768 / 32) ** 0.5)


def test_momentum_warms_up():
    assert momentum_at(0, 0.95) == 0.85
    assert momentum_at(300, 0.95) == momentum_at(10_000, 0.95) == pytest.approx(0.95)
    assert momentum_at(0, 0.5) == 0.5

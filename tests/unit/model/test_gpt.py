"""The transformer against plain references."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import Model
from nanochat.errors import UserError
from nanochat.model import loss
from nanochat.model.additions import has_window
from nanochat.model.attention import KVCache
from nanochat.model.files import load_model, save_model
from nanochat.model.gpt import GPT, GPTConfig

SIZES = GPTConfig.from_settings(Model(depth=2, width=32, head_dim=8), vocab_size=61, sequence_length=16)
GROUPED = dataclasses.replace(SIZES, kv_heads=2)
DEEP = dataclasses.replace(GROUPED, depth=6)  # enough layers for one with a window of 4 after one without


def random_model(sizes: GPTConfig) -> GPT:
    """A model whose every weight matters (the real start has zero projections)."""
    model = GPT(sizes)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [SIZES, GROUPED, DEEP], ids=["full", "grouped", "deep"])
def test_cached_steps_equal_full_recompute(sizes):
    model, text = random_model(sizes), tokens(3, 14)
    full = model(text)
    cache = KVCache(sizes, rows=3, length=20, device=torch.device("cpu"), dtype=torch.float32)
    positions = torch.arange(14).expand(3, -1)
    parts = [model(text[:, :6], positions=positions[:, :6], cache=cache)]
    parts += [model(text[:, i : i + 1], positions=positions[:, i : i + 1], cache=cache) for i in range(6, 14)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)


def test_cached_rows_may_stand_at_different_positions():
    model, text = random_model(GROUPED), tokens(2, 12)
    full = model(text)
    cache = KVCache(GROUPED, 2, 12, torch.device("cpu"), torch.float32)
    for row, prompt in ((0, 4), (1, 9)):
        part = cache.sliced(first_row=row, rows=1)
        model(text[row : row + 1, :prompt], positions=torch.arange(prompt)[None], cache=part)
    at = torch.tensor([[4], [9]])
    step = model(torch.gather(text, 1, at), positions=at, cache=cache.sliced(length=11), last_only=True)
    torch.testing.assert_close(step[0, 0], full[0, 4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step[1, 0], full[1, 9], rtol=1e-5, atol=1e-5)


def test_grouped_queries_equal_full_heads_with_repeated_weights():
    grouped = random_model(GROUPED)
    full = random_model(SIZES)
    state = grouped.state_dict()
    head_dim, repeat = 8, SIZES.heads // GROUPED.kv_heads
    for name in [n for n in state if n.endswith("qkv.weight")]:
        queries, keys, values = state[name].split([32, 16, 16])
        repeated = [t.view(2, head_dim, 32).repeat_interleave(repeat, 0).reshape(32, 32) for t in (keys, values)]
        state[name] = torch.cat([queries, *repeated])
    for name in [n for n in state if "value_embedding" in n]:
        heads = state[name].view(-1, head_dim if name.endswith("embedding") else state[name].size(1))
        by_head = heads.view(-1, GROUPED.kv_heads, heads.size(1)).repeat_interleave(repeat, 1)
        state[name] = by_head.reshape(len(state[name]), -1) if name.endswith("embedding") else by_head[0]
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens(2, 9)), grouped(tokens(2, 9)), rtol=1e-5, atol=1e-5)


def test_future_tokens_do_not_change_the_past():
    model, text = random_model(SIZES), tokens(1, 12)
    changed = text.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SIZES.vocab_size
    torch.testing.assert_close(model(text)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(text)[:, 7:], model(changed)[:, 7:])


@pytest.mark.parametrize("depth", range(1, 14))
def test_the_last_layer_and_every_fourth_see_everything(depth):
    short = [has_window(layer, depth) for layer in range(depth)]
    assert not short[-1]
    assert short[:-1] == ([True, True, True, False] * 4)[: depth - 1]
    model = GPT(dataclasses.replace(SIZES, depth=depth))
    assert [block.attention.window for block in model.blocks] == [4 if some else None for some in short]


def test_a_window_is_a_quarter_of_the_length_that_it_was_first_trained_with():
    assert SIZES.window == SIZES.with_sequence_length(64).window == 4
    assert dataclasses.replace(SIZES, window=0, sequence_length=3).window == 1
    assert dataclasses.replace(SIZES, window=0, additions=()).window == 0


def test_a_token_reaches_as_far_as_the_windows_let_it():
    """Windows of 4 in two layers reach 3 tokens each, the smear one; where the last layer is the only long one, all of it."""
    model = random_model(dataclasses.replace(DEEP, depth=3))
    text = tokens(2, 14)
    changed = text.clone()
    changed[:, 2] = (changed[:, 2] + 1) % SIZES.vocab_size
    assert (model(text) - model(changed)).abs().amax((0, 2))[2:].all()
    model.blocks = model.blocks[:2]
    reached = (model(text) - model(changed)).abs().amax((0, 2)) > 0
    assert reached.tolist() == [2 <= t <= 2 + 3 + 3 + 1 for t in range(14)]


def test_logits_stay_inside_the_softcap():
    model = random_model(dataclasses.replace(SIZES, logit_softcap=3.0))
    with torch.no_grad():
        model.head.mul_(100)
    assert model(tokens(2, 8)).abs().max() <= 3.0


@given(
    count=st.integers(1, 70), vocab=st.integers(2, 90), chunk=st.integers(1, 40), softcap=st.sampled_from([2.0, 15.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_chunked_loss_equals_reference(count, vocab, chunk, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(count, 8, dtype=torch.float64).normal_(generator=generator)
    weight = torch.empty(vocab, 8, dtype=torch.float64).normal_(generator=generator)
    targets = torch.randint(-1, vocab, (count,), generator=generator)
    reference_x, reference_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = softcap * torch.tanh(reference_x @ reference_weight.T / softcap)
    reference = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (reference * 0.25).backward()
    x32, weight32 = x.float().requires_grad_(), weight.float().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "chunk_tokens", lambda vocab_size, device: chunk)
        total = loss.summed_loss(x32, weight32, targets, softcap)
        each = loss.token_losses(x32.detach(), weight32.detach(), targets, softcap)
    (total * 0.25).backward()
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(total, reference, **close)
    torch.testing.assert_close(each.sum(), reference, **close)
    torch.testing.assert_close(x32.grad, reference_x.grad, **close)
    torch.testing.assert_close(weight32.grad, reference_weight.grad, **close)
    assert not each[targets < 0].any()


def test_gradients_flow_through_the_logits_as_through_the_loss():
    model, text, targets = random_model(SIZES), tokens(2, 8), tokens(2, 8, seed=1)
    model(text, targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(text).flatten(0, 1), targets.flatten()).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_loss_without_a_target_is_zero_not_nan():
    model, text = random_model(SIZES), tokens(2, 8)
    for reduction in ("mean", "sum"):
        value = model(text, torch.full_like(text, -1), reduction=reduction)
        value.backward()
        assert value.item() == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_a_fresh_model_predicts_every_token_alike():
    model = GPT(SIZES)
    model.init_weights(torch.Generator().manual_seed(0))
    value = model(tokens(4, 16), tokens(4, 16, seed=1))
    torch.testing.assert_close(value, torch.tensor(float(SIZES.vocab_size)).log(), rtol=0.01, atol=0.01)


def test_saved_model_is_the_same_model(tmp_path):
    model = random_model(GROUPED)
    save_model(tmp_path, model, {"tokenizer_sha256": "abc", "stage": "base", "step": 7})
    loaded = load_model(tmp_path, torch.device("cpu"), tokenizer_sha256="abc")
    assert torch.equal(loaded(tokens(2, 8)), model(tokens(2, 8)))
    half = load_model(tmp_path, torch.device("cpu"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.cos.dtype == torch.float32
    torch.testing.assert_close(half(tokens(2, 8)), model(tokens(2, 8)), rtol=0.3, atol=0.3)


def test_model_files_that_do_not_belong_together_are_refused(tmp_path):
    save_model(tmp_path, random_model(SIZES), {"tokenizer_sha256": "abc"})
    with pytest.raises(UserError, match="belongs to another run"):
        load_model(tmp_path, torch.device("cpu"), tokenizer_sha256="def")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors.*sha256"):
        load_model(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(("heads", "kv_heads", "key"), [(5, 5, "width"), (4, 3, "kv_heads")])
def test_sizes_that_do_not_divide_are_refused(heads, kv_heads, key):
    with pytest.raises(UserError, match=rf"model\.{key}"):
        dataclasses.replace(SIZES, heads=heads, kv_heads=kv_heads)

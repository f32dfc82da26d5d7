"""Hand-written operations against torch's own, forward and gradient."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.model import kernels
from nanochat.model.kernels import EPSILON, causal_attention, lookup, norm, squared_relu, tanh_

shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 33))


def drawn(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.empty(shape, dtype=torch.float64).normal_(generator=generator)).requires_grad_()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True])
def test_lookup_and_its_gradient_are_those_of_torch_bitwise_each_time(two_threads, compiled):
    """Of so few rows, and so many tokens, that two threads adding to one table would meet."""
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    function = torch.compile(lookup, dynamic=False) if compiled else lookup
    table, grad = drawn((5, 64), 0).detach().float().requires_grad_(), drawn((16, 1024, 64), 1).detach().float()
    tokens = torch.randint(5, (16, 1024), generator=torch.Generator().manual_seed(2))
    expected = F.embedding(tokens, table)
    (expected_grad,) = torch.autograd.grad(expected, table, grad)
    for _ in range(20):
        found = function(table, tokens)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, table, grad)[0], expected_grad)
    assert torch.equal(function(table.detach(), tokens), expected)


@given(shape=shapes, seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=30)
def test_norm_and_its_gradient(shape, seed, scale):
    x, other = drawn(shape, seed, scale), drawn(shape, seed, scale)
    grad = drawn(shape, seed + 1).detach()
    norm(x).backward(grad)
    F.rms_norm(other, (shape[-1],), eps=EPSILON).backward(grad)
    torch.testing.assert_close(norm(x), F.rms_norm(other, (shape[-1],), eps=EPSILON))
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-9)


@given(shape=shapes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_squared_relu_and_its_gradient(shape, seed):
    assert torch.autograd.gradcheck(squared_relu, drawn(shape, seed))
    x = drawn(shape, seed)
    torch.testing.assert_close(squared_relu(x), F.relu(x) ** 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_over_the_square_and_its_gradient(heads, kv_heads):
    sides = [drawn((2, n, 7, 6), seed) for seed, n in enumerate((heads, kv_heads, kv_heads))]
    others = [side.detach().clone().requires_grad_() for side in sides]
    grad = drawn((2, heads, 7, 6), 9).detach()
    causal_attention(*sides).backward(grad)
    F.scaled_dot_product_attention(*others, is_causal=True, enable_gqa=True).backward(grad)
    for side, other in zip(sides, others, strict=True):
        torch.testing.assert_close(side.grad, other.grad)


def windowed_by_hand(queries, keys, values, window):
    """One query after the other, over the keys that it sees."""
    out, group = torch.empty_like(queries), queries.size(1) // keys.size(1)
    for head in range(queries.size(1)):
        for t in range(queries.size(2)):
            near = slice(max(0, t - window + 1), t + 1)
            scores = (keys[:, head // group, near] @ queries[:, head, t, :, None])[..., 0] * queries.size(-1) ** -0.5
            out[:, head, t] = (scores.softmax(-1)[..., None] * values[:, head // group, near]).sum(1)
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (7, 1), (7, 3), (16, 4), (13, 5), (9, 9), (9, 40)])
@pytest.mark.parametrize("piece", [1, 128])
def test_windowed_attention_and_its_gradient(heads, kv_heads, tokens, window, piece, monkeypatch):
    """In pieces where these are small enough, else over the masked square."""
    monkeypatch.setattr(kernels, "PIECE_TOKENS", piece)
    sides = [drawn((2, n, tokens, 6), seed) for seed, n in enumerate((heads, kv_heads, kv_heads))]
    others = [side.detach().clone().requires_grad_() for side in sides]
    grad = drawn((2, heads, tokens, 6), 9).detach()
    found, expected = causal_attention(*sides, window), windowed_by_hand(*others, window)
    torch.testing.assert_close(found, expected)
    found.backward(grad)
    expected.backward(grad)
    for side, other in zip(sides, others, strict=True):
        torch.testing.assert_close(side.grad, other.grad)


@pytest.mark.parametrize("square", [0, 10_000])
@pytest.mark.parametrize(("tokens", "window"), [(257, 1), (257, 128), (300, 75), (1024, 65), (1000, 200)])
def test_pieces_of_a_window_see_what_the_masked_square_sees(tokens, window, square, monkeypatch):
    """With torch's attention and by hand; nothing of a position that is not seen comes through."""
    monkeypatch.setattr(kernels, "SQUARE_TOKENS", square)
    queries, keys, values = (drawn((2, 3, tokens, 8), seed).detach() for seed in range(3))
    positions = torch.arange(tokens)
    mask = kernels.seen(positions[:, None], positions, window)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    torch.testing.assert_close(causal_attention(queries, keys, values, window), expected)
    at = tokens // 2
    changed = [side.clone() for side in (keys, values)]
    for side in changed:
        side[:, :, at + 1 :] = 1e6
        side[:, :, : max(0, at - window + 1)] = -1e6
    torch.testing.assert_close(causal_attention(queries, *changed, window)[:, :, at], expected[:, :, at])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("tokens", "window"), [(128, 32), (300, 75), (300, 200), (512, 128), (300, 400)])
def test_blocks_of_a_window_are_the_window(tokens, window):
    """What a GPU's compiled code skips by; on a CPU FlexAttention has no gradient."""
    sides = [drawn((1, n, tokens, 16), seed).detach().float() for seed, n in enumerate((2, 1, 1))]
    blocks = kernels._blocks(tokens, window, torch.device("cpu"))
    torch.testing.assert_close(causal_attention(*sides, window, blocks), causal_attention(*sides, window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("tokens", "window"), [(2048, 512), (300, 75)])
def test_windows_on_a_gpu_are_those_of_the_masked_square(heads, kv_heads, tokens, window):
    """Compiled code, which skips blocks, and eager code, as the model calls both: views of (B, T, H, D), bfloat16."""
    device = torch.device("cuda")
    blocks = kernels.window_blocks(tokens, window, 128, device)
    grad = drawn((2, tokens, heads, 128), 9).detach().bfloat16().to(device).transpose(1, 2)
    results = []
    for function, dtype, some in (
        (torch.compile(causal_attention, dynamic=False), torch.bfloat16, blocks),
        (causal_attention, torch.bfloat16, None),
        (causal_attention, torch.float32, None),
    ):
        shapes = [(2, tokens, n, 128) for n in (heads, kv_heads, kv_heads)]
        sides = [drawn(shape, seed).detach().bfloat16().to(device, dtype) for seed, shape in enumerate(shapes)]
        sides = [side.requires_grad_() for side in sides]
        attended = function(*(side.transpose(1, 2) for side in sides), window, some)
        attended.backward(grad.to(dtype))
        results.append([attended.detach(), *(side.grad for side in sides)])
    for compiled, eager, expected in zip(*results, strict=True):
        assert (compiled - expected).norm() < 0.01 * expected.norm()
        assert (eager - expected).norm() < 0.01 * expected.norm()


def test_blocks_are_skipped_where_that_serves():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.window_blocks(2048, 512, 128, cpu) is None
    assert kernels.window_blocks(2048, None, 128, gpu) is kernels.window_blocks(127, 31, 128, gpu) is None
    blocks = kernels._blocks(2048, 512, cpu)
    # Of the 16 x 16 blocks: in each row the diagonal one, the three before it and a part of the fourth.
    seen = blocks.kv_num_blocks + blocks.full_kv_num_blocks
    assert seen.flatten().tolist() == [1, 2, 3, 4, *[5] * 12]


def test_bfloat16_stays_bfloat16():
    x = drawn((2, 3, 8), 0).detach().bfloat16()
    assert norm(x).dtype == squared_relu(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float().square().mean(-1), torch.ones(2, 3), rtol=0.02, atol=0.02)


def test_tanh_in_place():
    x = torch.linspace(-40, 40, 1001)
    torch.testing.assert_close(tanh_(x.clone()), x.double().tanh(), rtol=0, atol=3e-7, check_dtype=False)

"""The Triton kernels of training against torch in float64: on a GPU as they run there, elsewhere in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

from nanochat.model import fused_loss, fused_mlp, fused_projection
from nanochat.model.attention import rotary_table, rotate
from nanochat.model.kernels import EPSILON

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the whole tensor's norm
CANARY = 7.0
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
few = settings(deadline=None, max_examples=12)


class Guarded:
    """A tensor between canaries, which show whether anything was written beside it."""

    def __init__(self, tensor: torch.Tensor):
        self.whole = torch.full((tensor.numel() + 128,), CANARY, dtype=tensor.dtype, device=tensor.device)
        self.tensor = self.whole[64:-64].view(tensor.shape).copy_(tensor)

    def intact(self) -> bool:
        return bool((self.whole[:64] == CANARY).all() and (self.whole[-64:] == CANARY).all())


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def doubled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """NaN is never close."""
    error, size = (found.double() - expected).norm(), expected.norm()
    assert error <= TOLERANCE[dtype] * size + 1e-6, f"relative error {error / size:.2e}"


@given(
    count=st.integers(1, 9), vocab=st.sampled_from([1, 2, 63, 1000, 4097, 9001, 32_769]), seed=st.integers(0, 99), dtype=dtypes,
    gradient=st.booleans(), softcap=st.sampled_from([2.0, 15.0]),
)  # fmt: skip
@few
def test_loss_of_a_slice_stays_in_its_place(kernel_device, count, vocab, seed, dtype, gradient, softcap):
    logits = 5 * normal(count, vocab, seed=seed, dtype=dtype, device=kernel_device)
    targets = torch.randint(-1, vocab, (count,), generator=torch.Generator().manual_seed(seed)).to(kernel_device)
    guarded, losses = Guarded(logits), Guarded(torch.full((count,), float("nan"), device=kernel_device))
    fused_loss.cross_entropy_(guarded.tensor, targets, losses.tensor, softcap, gradient)
    (raw,) = doubled(logits)
    expected = F.cross_entropy(softcap * torch.tanh(raw / softcap), targets, ignore_index=-1, reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), raw)
    assert guarded.intact()
    assert losses.intact()
    assert_close(losses.tensor, expected, torch.float32)
    assert_close(guarded.tensor, grad if gradient else raw, dtype)


@given(
    count=st.integers(1, 40),
    vocab=st.integers(2, 300),
    tokens=st.integers(1, 50),
    seed=st.integers(0, 99),
    dtype=dtypes,
)
@few
def test_summed_loss_and_its_gradients(kernel_device, count, vocab, tokens, seed, dtype):
    x = normal(count, 16, seed=seed, dtype=dtype, device=kernel_device).requires_grad_()
    weight = normal(vocab, 16, seed=seed + 1, dtype=torch.float32, device=kernel_device).requires_grad_()
    targets = torch.randint(-1, vocab, (count,), generator=torch.Generator().manual_seed(seed)).to(kernel_device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "slice_tokens", lambda vocab_size, dtype: tokens)
        total = fused_loss.SummedLoss.apply(x, weight, targets, 15.0)
    (total * 0.25).backward()
    each = fused_loss.cross_entropies(x.detach(), weight.detach(), targets, 15.0, tokens)
    other_x, other_weight = doubled(x, weight.to(dtype))
    expected = F.cross_entropy(
        15 * torch.tanh(other_x @ other_weight.T / 15), targets, ignore_index=-1, reduction="none"
    )
    (expected.sum() * 0.25).backward()
    assert_close(total, expected.sum(), dtype)
    assert_close(each, expected, dtype)
    assert_close(x.grad, other_x.grad, dtype)
    assert_close(weight.grad, other_weight.grad, dtype)
    assert not each[targets < 0].any()


shapes = {
    "rows": st.integers(1, 3), "length": st.integers(1, 35), "kv_heads": st.integers(1, 3), "group": st.integers(1, 3),
    "half": st.sampled_from([4, 6, 32]), "seed": st.integers(0, 99), "dtype": dtypes,
}  # fmt: skip


def reference(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int) -> list[torch.Tensor]:
    turned = rotate(qkv[:, :, : heads + kv_heads], cos.double(), sin.double())
    normed = F.rms_norm(turned, (qkv.size(-1),), eps=EPSILON)
    return [normed[:, :, :heads], normed[:, :, heads:], qkv[:, :, heads + kv_heads :]]


@given(own_positions=st.booleans(), head_first=st.booleans(), **shapes)
@few
def test_turning_there_and_back_stays_in_its_place(
    kernel_device, rows, length, kv_heads, group, half, seed, dtype, own_positions, head_first
):
    heads = kv_heads * group
    product = normal(rows, length, heads + 2 * kv_heads, 2 * half, seed=seed, dtype=dtype, device=kernel_device)
    tables = rotary_table(2 * length, 2 * half, 1e4, kernel_device)
    if own_positions:
        at = torch.arange(rows * length, device=kernel_device).view(rows, length) % (2 * length)
        cos, sin = (table[at][:, :, None] for table in tables)
    else:
        cos, sin = (table[None, :length, None] for table in tables)
    qkv = Guarded(product)
    inverses = fused_projection.turn_(qkv.tensor, cos, sin, heads + kv_heads)
    (other,) = doubled(product)
    parts = reference(other, cos, sin, heads, kv_heads)
    grads = [normal(*part.shape, seed=seed + i, dtype=dtype, device=kernel_device) for i, part in enumerate(parts, 1)]
    torch.autograd.backward(parts, [grad.double() for grad in grads])
    if head_first:  # the layout in which another attention may hand them over
        grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    found = fused_projection.turn_back(tuple(grads), qkv.tensor, inverses, cos, sin)
    assert qkv.intact()
    assert_close(qkv.tensor, torch.cat(parts, dim=2), dtype)
    assert_close(found, other.grad, dtype)


@given(**shapes)
@few
def test_projection_and_its_gradients(kernel_device, rows, length, kv_heads, group, half, seed, dtype):
    heads = kv_heads * group
    x = normal(rows, length, 24, seed=seed, dtype=dtype, device=kernel_device).requires_grad_()
    weight = normal((heads + 2 * kv_heads) * 2 * half, 24, seed=seed + 1, dtype=dtype, device=kernel_device)
    weight.requires_grad_()
    cos, sin = (table[None, :, None] for table in rotary_table(length, 2 * half, 1e4, kernel_device))
    found = fused_projection.Projection.apply(x, weight, cos, sin, heads, kv_heads)
    other_x, other_weight = doubled(x, weight)
    qkv = (other_x @ other_weight.T).view(rows, length, heads + 2 * kv_heads, 2 * half)
    expected = reference(qkv, cos, sin, heads, kv_heads)
    grads = [normal(*part.shape, seed=seed + i, dtype=dtype, device=kernel_device) for i, part in enumerate(found, 2)]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for part, other in zip(found, expected, strict=True):
        assert_close(part, other, dtype)
    assert_close(x.grad, other_x.grad, dtype)
    assert_close(weight.grad, other_weight.grad, dtype)


# A GPU's shared memory holds the tiles in bfloat16 alone; the interpreter multiplies no bfloat16 that came by a descriptor.
MLP_DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


@pytest.fixture(scope="session")
def mlp_device(kernel_device):
    if kernel_device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the fused MLP is for Hopper")
    return kernel_device


mlp_shapes = {
    "count": st.integers(1, 300), "width": st.sampled_from([8, 64, 136]), "hidden": st.sampled_from([16, 256, 264]),
    "seed": st.integers(0, 99),
}  # fmt: skip


@given(**mlp_shapes)
@settings(few, max_examples=6)
def test_products_of_the_mlp_stay_in_their_place(mlp_device, count, width, hidden, seed):
    dtype = MLP_DTYPE
    x, up, grad = (
        normal(*shape, seed=seed + i, dtype=dtype, device=mlp_device)
        for i, shape in enumerate([(count, width), (hidden, width), (count, width)])
    )
    with pytest.MonkeyPatch.context() as patch:
        guards, plain = [], torch.Tensor.new_empty

        def new_empty(self, *shape, **others):
            if others:  # the interpreter's own
                return plain(self, *shape, **others)
            guards.append(Guarded(torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)))
            return guards[-1].tensor

        patch.setattr(torch.Tensor, "new_empty", new_empty)
        squared = fused_mlp._launch(x, up, None)
        back = fused_mlp._launch(grad, up, squared)
    other_x, other_up, other_grad = doubled(x, up, grad)
    u = other_x @ other_up.T
    assert len(guards) == 2
    assert all(guard.intact() for guard in guards)
    assert_close(squared, u.relu().square(), dtype)
    assert_close(back, 2 * u.relu() * (other_grad @ other_up.T), dtype)


@given(rows=st.integers(1, 2), **mlp_shapes)
@settings(few, max_examples=6)
def test_mlp_and_its_gradients(mlp_device, rows, count, width, hidden, seed):
    dtype = MLP_DTYPE
    x = normal(rows, count, width, seed=seed, dtype=dtype, device=mlp_device).requires_grad_()
    up = normal(hidden, width, seed=seed + 1, dtype=dtype, device=mlp_device).requires_grad_()
    down = normal(width, hidden, seed=seed + 2, dtype=dtype, device=mlp_device).requires_grad_()
    grad = normal(rows, count, width, seed=seed + 3, dtype=dtype, device=mlp_device)
    found = fused_mlp.FusedMLP.apply(x, up, down)
    found.backward(grad)
    others = doubled(x, up, down)
    expected = (others[0] @ others[1].T).relu().square() @ others[2].T
    expected.backward(grad.double())
    assert_close(found, expected, dtype)
    for tensor, other in zip((x, up, down), others, strict=True):
        assert_close(tensor.grad, other.grad, dtype)


def test_what_is_not_a_number_stays_so_in_the_mlp(mlp_device):
    """relu by a maximum would make it 0, and a run that diverged would go on."""
    x, up = (normal(n, 16, seed=n, dtype=MLP_DTYPE, device=mlp_device) for n in (9, 24))
    x[4, 3] = float("nan")
    squared = fused_mlp.up_squared(x, up)
    assert squared[4].isnan().all()
    assert squared.isfinite().sum() == 8 * 24


def test_operations_are_what_the_compiler_believes(kernel_device):
    """Shapes, dtypes and strides as promised; nothing written that was not announced."""
    x, weight = torch.randn(7, 8, device=kernel_device), torch.randn(50, 8, device=kernel_device)
    targets = torch.randint(-1, 50, (7,), device=kernel_device)
    library.opcheck(fused_loss.cross_entropy_sum, (x, weight, targets, 15.0, 3))
    library.opcheck(fused_loss.cross_entropies, (x, weight, targets, 15.0, 3))
    cos, sin = (table[None, :, None] for table in rotary_table(5, 6, 1e4, kernel_device))
    stream, matrix = torch.randn(2, 5, 8, device=kernel_device), torch.randn(24, 8, device=kernel_device)
    library.opcheck(fused_projection.project_and_turn, (stream, matrix, cos, sin, 2, 1))
    qkv, inverses = fused_projection.project_and_turn(stream, matrix, cos, sin, 2, 1)
    grads = qkv.split((2, 1, 1), dim=2)
    library.opcheck(fused_projection.turn_back_op, (*grads, qkv, inverses, cos, sin))


def test_operations_of_the_mlp_are_what_the_compiler_believes(mlp_device):
    x, up = (torch.randn(n, 16, device=mlp_device, dtype=torch.bfloat16) for n in (7, 24))
    library.opcheck(fused_mlp.up_squared, (x, up))
    library.opcheck(fused_mlp.down_back, (x, up.T.contiguous(), torch.rand(7, 24, device=mlp_device).bfloat16()))

"""The Triton kernels of attention against torch in float64, as `test_decode_kernels` holds the others."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

from nanochat.infer import attention_kernels as attention
from nanochat.model.attention import rotary_table, rotate
from tests.unit.infer.kernels_here import DEVICE, DTYPES, FAILS, ON_GPU, PDL, Guarded, close, random

pytestmark = [pytest.mark.skipif(FAILS is not None, reason=str(FAILS)), *([pytest.mark.gpu] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 32), (4, 1, 64)])
@pytest.mark.parametrize(
    ("splits", "tile", "lines", "held", "stages", "window"),
    [
        (1, 32, 8, 1, 1, 0),
        (1, 16, 16, 0, 3, 17),
        (3, 16, 4, 1, 2, 0),
        (4, 32, 32, 2, 1, 0),
        (3, 16, 1, 4, 1, 40),
        (1, 8, 4, 3, 1, 0),
        (1, 16, 8, 2, 1, 0),
        (2, 16, 8, 0, 1, 1),
    ],
)
def test_attention_reads_what_is_seen_and_stores_the_new_token(
    dtype, heads, kv_heads, head_dim, splits, tile, lines, held, stages, window
):
    """Rows at the first, the last and other positions, in caches that are NaN where nothing is filled or the window does not
    reach; a halted row stores nothing."""
    length, places = 100, [0, 1, 15, 16, 17, 47, 96, 99, 50]
    rows = capacity = len(places)
    halted = rows - 1
    qkv = random(rows, heads + 2 * kv_heads, head_dim, seed=1, dtype=dtype)
    cos, sin = (side.to(DEVICE, dtype) for side in rotary_table(length, head_dim, 10_000.0))
    position = torch.tensor(places, device=DEVICE)
    running = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    running[halted] = False
    keys, values = (Guarded(rows, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    all_keys, all_values = (side.tensor.transpose(1, 2) for side in (keys, values))
    for row, filled in enumerate(places):
        for side, seed in ((all_keys, 2), (all_values, 3)):
            side[row, :filled] = random(filled, kv_heads, head_dim, seed=seed + 10 * row, dtype=dtype)
            if window:
                side[row, : max(0, filled - window + 1)] = float("nan")
    before = all_keys.clone()
    out = Guarded(rows, heads, head_dim, dtype=dtype)
    parts, totals = Guarded(splits, capacity, heads, head_dim), Guarded(splits, capacity, heads)
    if heads == kv_heads:
        kernel, cut = attention.attend, (heads, head_dim, tile, lines)
    else:
        kernel, cut = attention.attend_in_groups, (heads, kv_heads, head_dim, 16, max(16, tile))
    kernel[(rows, kv_heads, splits)](
        qkv, keys.tensor, values.tensor, out.tensor if splits == 1 else parts.tensor, totals.tensor, cos, sin, position, running,
        position, qkv, length, capacity, qkv[0].numel(), False, window, *cut, splits, HELD=held, STAGES=stages, num_warps=2, **PDL,
    )  # fmt: skip
    if splits > 1:
        attention.merge[(rows, heads)](
            parts.tensor, totals.tensor, out.tensor, capacity, heads, head_dim, splits, num_warps=1, **PDL
        )
    assert all(guarded.intact() for guarded in (keys, values, out, parts, totals))

    turned = rotate(qkv[:, None].double(), *(side[position][:, None, None].double() for side in (cos, sin)))[:, 0]
    turned = turned * (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    for row, filled in enumerate(places):
        if row == halted:
            assert torch.equal(all_keys[row].nan_to_num(), before[row].nan_to_num())
            continue
        seen = slice(max(0, filled - window + 1) if window else 0, filled + 1)
        k, v = (side[row, seen].double() for side in (all_keys, all_values))  # (T, KV, D)
        assert close(k[-1], turned[row, heads : heads + kv_heads], dtype)
        assert torch.equal(v[-1], qkv[row, heads + kv_heads :].double())
        assert all_keys[row, filled + 1 :].isnan().all()
        group = heads // kv_heads
        scores = torch.einsum("hd,thd->ht", turned[row, :heads], k.repeat_interleave(group, 1)) * head_dim**-0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), v.repeat_interleave(group, 1))
        assert close(out.tensor[row], expected, dtype)

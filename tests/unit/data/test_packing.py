"""Whole conversations in rows, none lost."""

from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.packing import pack

lengths = st.lists(st.integers(1, 300), max_size=80)


@given(lengths=lengths, row=st.integers(300, 512), seed=st.integers(0, 5))
def test_packing_keeps_every_conversation_whole(lengths, row, seed):
    packed = pack(lengths, row, seed)
    assert sorted(i for r in packed.rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= row for r in packed.rows)
    assert packed.truncated == 0
    places = len(packed.rows) * row
    assert packed.padding_fraction == (1 - sum(lengths) / places if places else 0)


@given(lengths=lengths, row=st.integers(10, 100))
def test_longer_ones_are_cut_and_counted(lengths, row):
    packed = pack(lengths, row)
    assert packed.truncated == sum(n > row for n in lengths)
    assert all(sum(min(lengths[i], row) for i in r) <= row for r in packed.rows)


@given(lengths=lengths, row=st.integers(300, 512))
def test_no_two_rows_would_fit_in_one(lengths, row):
    filled = sorted(sum(lengths[i] for i in r) for r in pack(lengths, row).rows)
    assert len(filled) < 2 or filled[0] + filled[1] > row


def test_many_conversations_leave_almost_no_padding():
    lengths = [17 + i * 7919 % 400 for i in range(5000)]
    assert pack(lengths, 2049).padding_fraction < 0.005


def test_order_is_drawn_from_the_seed():
    lengths = [10 + i % 50 for i in range(200)]
    assert pack(lengths, 128, 1) == pack(lengths, 128, 1) != pack(lengths, 128, 2)
    longest_first = sum(r[0] == max(r, key=lambda i: lengths[i]) for r in pack(lengths, 128, 1).rows)
    assert longest_first < 0.8 * len(pack(lengths, 128, 1).rows)

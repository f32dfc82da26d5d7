"""Rows are a pure function of (seed, step), each once an epoch, however they are shared out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import command_settings, config
from nanochat.data import conversations
from nanochat.data.conversation_files import Conversations
from nanochat.data.loader import ChatLoader, PretrainLoader, permuted
from nanochat.data.token_shards import TokenShards
from nanochat.errors import UserError

T = 64


@pytest.fixture(scope="module")
def shards(tokens_folder):
    return TokenShards.open(tokens_folder, "train")


@pytest.fixture(scope="module")
def chats(corpus_folder, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    mixture = config._sources(identity=100, spelling=200, arithmetic=200)
    settings = command_settings.ConversationsSettings(stage="sft", seed=1, mixture=mixture)
    conversations.build(settings, corpus_folder, tokenizer_folder, folder)
    return folder


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 50))
def test_permutation_is_one(count, seed, epoch):
    assert sorted(permuted(np.arange(count), count, seed, epoch)) == list(range(count))


def test_permutation_mixes_and_differs_by_seed_and_epoch():
    a, b, c = (permuted(np.arange(1000), 1000, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0)))
    assert (a == b).sum() < 20
    assert (a == c).sum() < 20
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.1


def test_permutation_of_a_billion_rows_takes_no_table():
    rows = permuted(np.arange(10**9 - 100, 10**9), 10**9, 3, 0)
    assert len(set(rows.tolist())) == 100
    assert rows.min() >= 0
    assert rows.max() < 10**9


def test_validation_rows_are_spread_over_the_text(shards):
    plain = PretrainLoader(shards, 4, T, seed=None)
    spread = PretrainLoader(shards, 4, T, seed=None, spread=10)
    rows = [int(row) for step in range(3) for row in spread.row_index(step, 0, 4)][:10]
    assert rows == [i * plain.rows_per_epoch // 10 for i in range(10)]
    every = PretrainLoader(shards, 4, T, seed=None, spread=plain.rows_per_epoch)
    assert every.row_index(2, 0, 4).tolist() == plain.row_index(2, 0, 4).tolist() == [8, 9, 10, 11]


def test_targets_are_the_next_tokens(shards):
    inputs, targets = PretrainLoader(shards, 8, T, seed=5).micro_batch(3, 0, 8)
    assert inputs.shape == targets.shape == (8, T)
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("parts", [[8], [4, 4], [1] * 8, [3, 5]])
def test_a_step_is_the_same_rows_however_it_is_shared_out(shards, chats, parts):
    for loader in (PretrainLoader(shards, 8, T, seed=5), ChatLoader(chats, 8, T, seed=5)):
        for step in (0, 7, 1_000):
            whole = loader.micro_batch(step, 0, 8)
            pieces = [loader.micro_batch(step, sum(parts[:i]), rows) for i, rows in enumerate(parts)]
            for side in (0, 1):
                assert np.array_equal(np.concatenate([piece[side] for piece in pieces]), whole[side])


def test_an_epoch_shows_each_row_once_and_a_step_holds_distinct_rows(shards):
    loader = PretrainLoader(shards, 7, T, seed=5)
    steps = loader.rows_per_epoch // 7
    seen = np.concatenate([loader.row_index(step, 0, 7) for step in range(steps)])
    assert len(set(seen.tolist())) == len(seen)
    rest = loader.row_index(steps, 0, loader.rows_per_epoch - len(seen))
    assert sorted(np.concatenate([seen, rest])) == list(range(loader.rows_per_epoch))
    inputs, _ = loader.micro_batch(0, 0, 7)
    assert len({row.tobytes() for row in inputs}) == 7


def test_another_loader_goes_on_at_any_step(shards):
    one, two = (PretrainLoader(shards, 8, T, seed=5) for _ in range(2))
    for step in range(20):
        one.micro_batch(step, 0, 8)
    assert np.array_equal(one.micro_batch(20, 0, 8)[0], two.micro_batch(20, 0, 8)[0])


def test_without_a_seed_rows_come_in_the_order_of_the_text(shards):
    inputs, _ = PretrainLoader(shards, 4, T, seed=None).micro_batch(2, 0, 4)
    assert np.array_equal(inputs.reshape(-1), shards.read(8 * T, 4 * T))


def test_text_too_small_for_a_row_or_a_step_is_an_error(shards):
    with pytest.raises(UserError, match=r"too few for one row of sequence_length \+ 1"):
        PretrainLoader(shards, 1, shards.total_tokens, seed=None)
    with pytest.raises(UserError, match=r"tokens_per_step = \d+: .* less than one step"):
        PretrainLoader(shards, 10**6, T)


def test_an_epoch_of_conversations_holds_every_token_once(chats):
    loader = ChatLoader(chats, 1, 128, seed=3, mask=False)
    source = Conversations.open(chats, "train")
    found: list[int] = []
    for row in range(loader.rows_per_epoch):
        inputs, targets = loader.micro_batch(0, row, 1)
        kept = targets[0] >= 0
        # The first token of a row is an input only.
        found += [int(inputs[0, 0]), *targets[0][kept].tolist()]
    assert loader.truncated == 0
    assert sorted(found) == sorted(np.asarray(source.ids).tolist())
    assert loader.padding_fraction == pytest.approx(1 - len(source.ids) / (loader.rows_per_epoch * 129))


def test_loss_is_on_what_the_assistant_says(chats, tokenizer):
    loader = ChatLoader(chats, 4, 128, seed=3)
    inputs, targets = loader.micro_batch(0, 0, 4)
    special = {
        tokenizer.special(f"<|{name}|>") for name in ("bos", "user_start", "user_end", "output_start", "output_end")
    }
    assert not special & set(targets[targets >= 0].tolist())
    starts = inputs == tokenizer.special("<|assistant_start|>")
    assert (targets[starts] >= 0).all()
    users = inputs == tokenizer.special("<|user_start|>")
    assert (targets[users] == -1).all()


def test_an_empty_split_is_named(corpus_folder, tokenizer_folder, tmp_path):
    mixture = config._sources(arithmetic=1)
    settings = command_settings.ConversationsSettings(stage="sft", seed=1, mixture=mixture)
    conversations.build(settings, corpus_folder, tokenizer_folder, tmp_path)
    with pytest.raises(UserError, match="holds no validation conversations"):
        ChatLoader(tmp_path, 1, 64, split="validation")

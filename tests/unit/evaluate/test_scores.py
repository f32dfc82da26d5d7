import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.chat import render_prompt
from nanochat.data.heldout import ChoiceItem, ClozeItem
from nanochat.data.token_shards import TokenShards
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.evaluate.held_out_tasks import cloze, keep_end, multiple_choice
from nanochat.evaluate.scores import centred, interval
from nanochat.infer.engine import Engine


def stored(folder, ids: list[int], vocab_size: int) -> TokenShards:
    """Those tokens as a validation split."""
    import json

    import numpy as np

    from nanochat.files import sha256

    path = folder / "validation-00000.bin"
    np.array(ids, "<u2").tofile(path)
    shard = {"file": path.name, "split": "validation", "tokens": len(ids), "documents": 1, "text_bytes": 1}
    shard |= {"size_bytes": path.stat().st_size, "sha256": sha256(path)}
    metrics = {"dtype": "uint16", "vocab_size": vocab_size, "bos_id": 256, "tokenizer_sha256": "x", "shards": [shard]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return TokenShards.open(folder, "validation")


@pytest.mark.parametrize("count", [2, 48, 49, 50, 200, 337])
def test_bits_per_byte_is_the_loss_of_each_token_once(tmp_path, build_model, tokenizer, count):
    """By hand: row by row, one forward pass each, special tokens left out."""
    model = build_model(tokenizer.vocab_size)
    ids = torch.randint(0, tokenizer.vocab_size, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    ids[-1] = 65  # at least one token of text
    score, predicted = bits_per_byte(model, stored(tmp_path, ids, 265), tokenizer.token_bytes(), 10**9)
    bits = size = 0.0
    for start in range(0, count - 1, 48):
        row = ids[start : start + 49]
        with torch.no_grad():
            table = model(torch.tensor([row[:-1]])).log_softmax(-1)[0]
        for i, target in enumerate(row[1:]):
            if target < 256:
                bits -= float(table[i, target]) / math.log(2)
                size += 1
    assert score == pytest.approx(bits / size, rel=1e-4)
    assert predicted == count - 1


def test_a_model_that_knows_nothing_needs_the_bits_of_the_vocabulary(tmp_path, build_model, tokenizer):
    model = build_model(tokenizer.vocab_size)
    model.head.data.zero_()
    ids = list(range(200))
    score, predicted = bits_per_byte(model, stored(tmp_path, ids, 265), tokenizer.token_bytes(), 100)
    assert score == pytest.approx(math.log2(tokenizer.vocab_size), rel=1e-5)
    assert predicted == 96  # whole rows of 48


@pytest.mark.parametrize(("most", "first"), [(100, [0, 480]), (20, None), (300, [0, 144, 288, 480, 624, 768])])
def test_a_part_of_the_split_is_spread_over_it(tmp_path, build_model, tokenizer, monkeypatch, most, first):
    """A corpus of several sources has them one after the other."""
    shards, places, read = stored(tmp_path, [65] * 1000, 265), [], TokenShards.read
    monkeypatch.setattr(TokenShards, "read", lambda self, at, count: places.append(at) or read(self, at, count))
    _, predicted = bits_per_byte(build_model(tokenizer.vocab_size), shards, tokenizer.token_bytes(), most)
    assert places == (first or [0])
    assert predicted == 48 * len(places)


def test_cloze_counts_what_greedy_decoding_completes(build_model, tokenizer):
    model = build_model(tokenizer.vocab_size)
    engine = Engine(model, rows=1)
    contexts = [f"context number {i} of some length" for i in range(10)]
    items = []
    for i, context in enumerate(contexts):
        ids = [tokenizer.bos_id, *tokenizer.encode(context)]
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids]), last_only=True)[0, -1].argmax()))
        target = tokenizer.decode_bytes([token for token in ids[-3:] if token < 256]).decode("latin1")
        # Every second one has what the model would say (where that is text), the others something else.
        items.append(
            (ClozeItem(context, target if i % 2 else " else", 0.1), i % 2 and tokenizer.encode(target) == ids[-3:])
        )
    score = cloze(engine, tokenizer, [item for item, _ in items])
    assert score.score * 10 == sum(bool(right) for _, right in items)
    assert score.baseline == pytest.approx(0.1)


@pytest.mark.parametrize("chat", [True, False])
def test_multiple_choice_takes_the_most_probable_letter(build_model, tokenizer, chat):
    model = build_model(tokenizer.vocab_size, length=400)
    items = [
        ChoiceItem("word", f"passage {i}", tuple(f"choice {i} {k}" for k in range(4)), answer_index=i % 4)
        for i in range(12)
    ]
    right = 0
    for item in items:
        question = f"Which word comes next?\n\n{item.context}\n\n"
        question += "\n".join(f"{letter}: {choice}" for letter, choice in zip("ABCD", item.choices, strict=True))
        question += "\n\nAnswer with the letter only."
        plain = [tokenizer.bos_id, *tokenizer.encode(f"{question}\n\nAnswer:\n")]
        prompt = render_prompt(tokenizer, [{"role": "user", "content": question}]) if chat else plain
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), last_only=True)[0, -1]
        right += int(logits[[ord(letter) for letter in "ABCD"]].argmax()) == item.answer_index
    score = multiple_choice(Engine(model, rows=1), tokenizer, items, chat)
    assert (score.score, score.baseline) == (right / 12, 0.25)
    assert score.facts["shortened_contexts"] == 0


@given(st.integers(3, 60), st.integers(0, 2), st.integers(3, 60))
def test_a_shortened_context_keeps_its_opening_and_its_end(length, head, most):
    ids = list(range(length))
    kept = keep_end(ids, head, most)
    assert len(kept) == min(length, most)
    assert kept[:head] == ids[:head]
    assert kept[-1] == ids[-1]
    assert kept == sorted(set(kept))


def test_the_interval_is_where_the_score_is_not_surprising():
    """Its ends are the shares p for which the score lies 1.96 standard deviations of p away: what Wilson solved for."""
    for right, items in ((0, 5), (5, 5), (3, 200), (61, 164), (1, 2)):
        score = right / items
        low, high = interval(score, items)
        assert 0 <= low <= score <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(score - end) == pytest.approx(1.95996 * math.sqrt(end * (1 - end) / items), rel=1e-4)


def test_centred_scores():
    assert centred(0.25, 0.25) == 0
    assert centred(1.0, 0.25) == 1
    assert centred(0.0, 0.25) == pytest.approx(-1 / 3)

"""The chat format: tokens, mask, and what is not of the format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.chat import render, render_prompt, require_format
from nanochat.data.tokenizer import SPECIAL_TOKENS

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "output"]), "text": text})
reply = st.one_of(text, st.lists(part, min_size=1, max_size=4))
turns = st.lists(st.tuples(text, reply), min_size=1, max_size=4).map(
    lambda pairs: [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
)

TOOL = [
    {"role": "user", "content": "What is 2 + 3?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see. "},
            {"type": "python", "text": "2+3"},
            {"type": "output", "text": "5"},
            {"type": "text", "text": "It is 5."},
        ],
    },
]


def test_the_format_as_documented(tokenizer):
    ids, _ = render(tokenizer, TOOL)
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>What is 2 + 3?<|user_end|><|assistant_start|>Let me see. <|python_start|>2+3<|python_end|>"
        "<|output_start|>5<|output_end|>It is 5.<|assistant_end|>"
    )


def test_loss_is_on_text_calls_and_the_end_not_on_tool_output(tokenizer):
    ids, mask = render(tokenizer, TOOL)
    with_loss = tokenizer.decode([token for token, loss in zip(ids, mask, strict=True) if loss])
    assert with_loss == "Let me see. <|python_start|>2+3<|python_end|>It is 5.<|assistant_end|>"


@given(turns)
def test_masked_tokens_are_what_the_assistant_wrote(tokenizer, messages):
    ids, mask = render(tokenizer, messages)
    assert len(ids) == len(mask)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    ends = sum(loss for token, loss in zip(ids, mask, strict=True) if token == tokenizer.special("<|assistant_end|>"))
    assert ends == len(messages) // 2
    assert not any(loss for token, loss in zip(ids, mask, strict=True) if token == tokenizer.special("<|output_end|>"))


@given(st.lists(st.sampled_from(SPECIAL_TOKENS), min_size=1, max_size=5).map("".join))
def test_what_looks_like_a_special_token_in_a_message_stays_text(tokenizer, content):
    ids, _ = render(tokenizer, [{"role": "user", "content": content}])
    assert [token for token in ids if token >= tokenizer.bos_id] == [
        tokenizer.special(name) for name in ("<|bos|>", "<|user_start|>", "<|user_end|>")
    ]


@given(turns, st.integers(1, 50))
def test_cut_to_a_length_it_is_a_prefix(tokenizer, messages, length):
    ids, mask = render(tokenizer, messages)
    assert render(tokenizer, messages, length) == (ids[:length], mask[:length])


def test_a_prompt_is_what_the_reply_follows_in_training(tokenizer):
    ids, _ = render(tokenizer, TOOL)
    prompt = render_prompt(tokenizer, TOOL[:1])
    assert ids[: len(prompt)] == prompt
    assert prompt[-1] == tokenizer.special("<|assistant_start|>")
    with pytest.raises(ValueError, match="a prompt ends with the user's"):
        render_prompt(tokenizer, TOOL)


def test_a_system_message_stands_in_front_of_the_first_question(tokenizer):
    with_system = [{"role": "system", "content": "Be brief."}, *TOOL]
    assert tokenizer.decode(render(tokenizer, with_system)[0]).startswith("<|bos|><|user_start|>Be brief.\n\nWhat is")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a list of messages and not empty"),
        ("Hi", "a list of messages and not empty"),
        (["Hi"], "keys role and content"),
        ([{"role": "user"}], "keys role and content"),
        ([{"role": "assistant", "content": "Hi"}], "message 1 is of role 'assistant' where 'user' must follow"),
        ([{"role": "robot", "content": "Hi"}], "message 1 is of role 'robot' where 'user' must follow"),
        ([{"role": "system", "content": "Hi"}], "a system message alone"),
        ([{"role": "user", "content": 5}], "the content of a user message must be a string"),
        (
            [*TOOL[:1], {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
            "a part is an object with a type of",
        ),
    ],
)
def test_what_is_not_of_the_format_is_said(messages, message):
    with pytest.raises(ValueError, match=message):
        require_format(messages)

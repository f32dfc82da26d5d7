import io
import itertools

import pytest
import torch

from nanochat.data.chat import render, render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.infer.calculator import calculate
from nanochat.infer.chat import Session, converse
from nanochat.infer.engine import Engine
from nanochat.infer.reply import reply_parts, stop_ids, visible_text
from nanochat.infer.requests import Request
from nanochat.infer.sampling import Sampling
from nanochat.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token for each byte, and the special ones."""
    return Tokenizer([bytes([i]) for i in range(256)])


def chain_model(tokenizer: Tokenizer, links: dict[int, int], length: int = 256) -> GPT:
    """A model that always follows one token by a certain other: what it says is known beforehand."""
    size = tokenizer.vocab_size
    config = GPTConfig(size, 1, 272, 4, 4, logit_softcap=15.0, rope_base=10_000.0, sequence_length=length)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embedding[range(size), range(size)] = 1.0
        for token, following in links.items():
            model.head[following, token] = 10.0
    return model


def chain(tokenizer: Tokenizer, *parts: str) -> dict[int, int]:
    """Each token of the parts is followed by the next; a part is a special token or text, no token comes twice."""
    ids = [
        token
        for part in parts
        for token in ([tokenizer.special(part)] if part.startswith("<|") else tokenizer.encode(part))
    ]
    assert len(set(ids)) == len(ids)
    return dict(itertools.pairwise(ids))


@pytest.fixture(scope="module")
def calculating(tokenizer) -> GPT:
    """Says `It <2*3> ok`, with the calculator's answer behind the call."""
    links = chain(tokenizer, "<|assistant_start|>", "It ", "<|python_start|>", "2*3", "<|python_end|>")
    return chain_model(tokenizer, links | chain(tokenizer, "<|output_end|>", "ok", "<|assistant_end|>"))


@pytest.mark.parametrize(("burst", "ahead"), [(1, 0), (16, 0), (16, 1), (2, 1), (1, 3)])
def test_the_calculator_answers_the_model(tokenizer, calculating, burst, ahead):
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "What is 2 * 3?"}])
    request = Request(prompt, 60, stop_ids=stop_ids(tokenizer), calculator=True)
    engine = Engine(calculating, tokenizer, rows=3)
    engine.burst, engine.ahead = (
        burst,
        ahead,
    )  # as on a GPU: the row waits in the middle of a burst, and through the next
    completion = engine.generate([Request(prompt, 20), request, *[Request(prompt, 5 + i) for i in range(4)]])[1]
    parts = [
        {"type": "text", "text": "It "},
        {"type": "python", "text": "2*3"},
        {"type": "output", "text": "6"},
        {"type": "text", "text": "ok"},
    ]
    messages = [{"role": "user", "content": "What is 2 * 3?"}, {"role": "assistant", "content": parts}]
    expected, _ = render(tokenizer, messages)
    assert prompt + completion.ids + [tokenizer.special("<|assistant_end|>")] == expected
    assert completion.stop_reason == "stop"
    assert visible_text(tokenizer, completion.ids) == "It [2*3 = 6]ok"
    assert reply_parts(tokenizer, completion.ids) == parts


def test_a_row_that_waits_for_the_calculator_keeps_its_prompt_beside_shorter_ones(tokenizer, tiny_model):
    """Its last tokens are launched, so that it counts for no step any more, when it turns out to go on behind the answer."""
    told = []
    for seed in range(40):
        model = tiny_model(seed=seed, length=256, vocab=tokenizer.vocab_size)
        kept = [1, 2, 3, 4, 5, 6, tokenizer.special("<|python_end|>")]
        with torch.no_grad():
            head = model.head.clone()
            model.head.zero_()
            model.head[kept] = 3 * head[kept]
        draw = torch.Generator().manual_seed(seed)
        long, *short = [torch.randint(0, 256, (n,), generator=draw).tolist() for n in (100, 5, 5, 5)]
        requests = [Request(long, 20, temperature=1.0, seed=seed, calculator=True)]
        requests += [Request(prompt, 40, temperature=1.0, seed=9, calculator=True) for prompt in short]
        answers = []
        for burst, ahead in ((1, 0), (8, 1)):
            engine = Engine(model, tokenizer, rows=4)
            engine.burst, engine.ahead = burst, ahead
            answers.append([completion.ids for completion in engine.generate(requests)])
        told.append((tokenizer.special("<|python_end|>") in answers[0][0], answers[0] == answers[1]))
    assert sum(halted for halted, _ in told) > 10
    assert all(same for _, same in told)


def test_a_call_that_is_no_arithmetic_gets_no_answer(tokenizer):
    links = chain(
        tokenizer, "<|assistant_start|>", "<|python_start|>", "abc", "<|python_end|>", "d", "<|assistant_end|>"
    )
    engine = Engine(chain_model(tokenizer, links), tokenizer, rows=1)
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "?"}])
    completion = engine.generate([Request(prompt, 20, stop_ids=stop_ids(tokenizer), calculator=True)])[0]
    assert visible_text(tokenizer, completion.ids) == "[abc]d"


def test_a_call_at_the_end_of_the_room_is_not_answered(tokenizer, calculating):
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "?"}])
    waiting = [Request(prompt, 3), Request(prompt, 2)]  # they take the row as soon as it is free
    for room in range(1, 15):
        found = []
        for burst, ahead in ((1, 0), (16, 1), (2, 1)):
            engine = Engine(calculating, tokenizer, rows=1)
            engine.burst, engine.ahead = burst, ahead
            found.append([c.ids for c in engine.generate([Request(prompt, room, calculator=True), *waiting])])
        assert found == found[:1] * 3
        assert len(found[0][0]) <= room


def test_without_the_calculator_a_call_is_text(tokenizer, calculating):
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "?"}])
    completion = Engine(calculating, tokenizer, rows=1).generate([Request(prompt, 8)])[0]
    assert tokenizer.special("<|output_start|>") not in completion.ids


def session(tokenizer: Tokenizer, model: GPT, max_tokens: int = 40) -> Session:
    return Session(Engine(model, tokenizer), tokenizer, Sampling(0.0), max_tokens, seed=0)


def test_a_conversation_in_the_terminal(tokenizer, calculating):
    talk = session(tokenizer, calculating)
    said = io.StringIO()
    converse(talk, io.StringIO("Hello\n\n/what\n/reset\nAgain\n"), said)
    assert said.getvalue().count("bot> It [2*3 = 6]ok\n") == 2
    assert "/what: no such command" in said.getvalue()
    assert [message["content"] for message in talk.messages[::2]] == ["Again"]


def test_history_is_seen_and_forgotten_from_its_start(tokenizer, calculating):
    talk = session(tokenizer, calculating)
    for i in range(12):
        assert "".join(talk.reply(f"message {i:02} " + "x" * 30)) == "It [2*3 = 6]ok"
        assert talk.messages[-2]["content"].startswith(f"message {i:02}")
    assert 2 < len(talk.messages) < 24
    assert len(render_prompt(tokenizer, talk.messages[:-1])) < talk.engine.length


def test_a_stopped_reply_stays_in_the_conversation_and_the_next_one_works(tokenizer, calculating):
    talk = session(tokenizer, calculating)
    pieces = talk.reply("Hello")
    assert next(pieces) == "I"
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "I"}]}
    assert "".join(talk.reply("Hello")) == "It [2*3 = 6]ok"


def test_ctrl_c_stops_the_reply_and_not_the_program(tokenizer, calculating):
    class Terminal(io.StringIO):
        """Ctrl-C is pressed when the reply's second letter is written, once."""

        pressed = False

        def write(self, text):
            if text == "t" and not self.pressed:
                Terminal.pressed = True
                raise KeyboardInterrupt
            return super().write(text)

    said = Terminal()
    converse(session(tokenizer, calculating), io.StringIO("one\ntwo\n"), said)
    assert "bot> I (stopped)" in said.getvalue()
    assert "bot> It [2*3 = 6]ok" in said.getvalue()


def test_a_message_longer_than_the_context_is_refused_and_the_next_one_works(tokenizer, calculating):
    said = io.StringIO()
    converse(session(tokenizer, calculating), io.StringIO("x" * 300 + "\nHello\n"), said)
    assert "the model sees 256. Shorten it." in said.getvalue()
    assert "bot> It [2*3 = 6]ok" in said.getvalue()


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tokenizer):
    links = chain(tokenizer, "<|assistant_start|>", "aß", "<|assistant_end|>")
    assert list(session(tokenizer, chain_model(tokenizer, links)).reply("?")) == ["a", "ß"]


def test_the_calculator_agrees_with_the_training_conversations():
    """What the model is taught to expect from a call is what it gets."""
    import random

    from nanochat.data.conversation_tasks import arithmetic

    calls = 0
    for _, messages in arithmetic(None, 500, random.Random(0)):
        parts = messages[1]["content"]
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                assert calculate(call["text"]) == output["text"]
                calls += 1
    assert calls == 500

"""The two tasks made from held-out text, scored by the probabilities of given continuations: nothing is generated."""

from nanochat.data.chat import render_prompt
from nanochat.data.heldout import LETTERS, ChoiceItem, ClozeItem, render_question
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluate.scores import TaskScore
from nanochat.infer.engine import Engine


def cloze(engine: Engine, tokenizer: Tokenizer, items: list[ClozeItem]) -> TaskScore:
    """Right when each token of the last word is the model's first choice."""
    length = engine.model.config.sequence_length
    pairs, shortened = [], 0
    for item in items:
        target = tokenizer.encode(item.target)
        context = [tokenizer.bos_id, *tokenizer.encode(item.context)]
        kept = keep_end(context, 1, length - len(target))
        shortened += len(kept) < len(context)
        pairs.append((kept, target))
    scored = engine.logprobs(pairs)
    return TaskScore(
        score=sum(one.greedy for one in scored) / len(items),
        baseline=sum(item.chance for item in items) / len(items),
        items=len(items),
        unit="fraction",
        description="Last word of a held-out passage, a word that occurs in it before; right when greedy decoding gives it. "
        "Chance: one of the passage's words of four letters or more.",
        facts={"shortened_contexts": shortened},
    )


def multiple_choice(engine: Engine, tokenizer: Tokenizer, items: list[ChoiceItem], chat: bool) -> TaskScore:
    """Right when the right letter is the most probable of the four as the next token."""
    length = engine.model.config.sequence_length
    letters = [tokenizer.encode(letter) for letter in LETTERS]
    pairs, shortened = [], 0
    for item in items:
        question = render_question(item.question, item.choices)
        if chat:
            context, head = render_prompt(tokenizer, [{"role": "user", "content": question}]), 2
        else:
            # The letter opens its line, as in the list of choices: there it is the same token.
            context, head = [tokenizer.bos_id, *tokenizer.encode(f"{question}\n\nAnswer:\n")], 1
        kept = keep_end(context, head, length - 1)
        shortened += len(kept) < len(context)
        pairs += [(kept, letter) for letter in letters]
    scored = engine.logprobs(pairs)
    right = 0
    for i, item in enumerate(items):
        four = [one.logprob for one in scored[i * len(LETTERS) : (i + 1) * len(LETTERS)]]
        right += four.index(max(four)) == item.answer_index
    return TaskScore(
        score=right / len(items),
        baseline=1 / len(LETTERS),
        items=len(items),
        unit="fraction",
        description="Which of four words or sentences goes on with a held-out passage; the most probable letter counts. "
        "Chance: 1 of 4.",
        facts={"shortened_contexts": shortened, "format": "chat" if chat else "plain"},
    )


def keep_end(ids: list[int], head: int, most: int) -> list[int]:
    """At most `most` tokens: the first `head`, which open the format, and as many as fit from the end."""
    return ids if len(ids) <= most else [*ids[:head], *ids[len(ids) - (most - head) :]]

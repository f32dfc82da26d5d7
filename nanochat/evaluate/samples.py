"""What the model writes: continuations of fixed prompts, and answers to fixed questions once it has learnt to chat."""

from nanochat.config import Evaluate
from nanochat.data.chat import render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.infer.engine import Engine
from nanochat.infer.reply import stop_ids, visible_text
from nanochat.infer.requests import Request

TOP_K = 50


def samples(engine: Engine, tokenizer: Tokenizer, settings: Evaluate, chat: bool, seed: int) -> list[dict]:
    """[{kind: prompt | question, prompt, text, tokens, stop_reason}], one of each."""
    asked = [("prompt", text, [tokenizer.bos_id, *tokenizer.encode(text)]) for text in settings.prompts]
    if chat:
        asked += [
            ("question", text, render_prompt(tokenizer, [{"role": "user", "content": text}]))
            for text in settings.questions
        ]
    requests = [
        Request(
            ids,
            max(1, min(settings.sample_tokens, engine.length - len(ids))),
            temperature=settings.temperature,
            top_k=TOP_K,
            seed=seed + number,
            stop_ids=stop_ids(tokenizer),
            calculator=kind == "question",
        )
        for number, (kind, _, ids) in enumerate(asked)
    ]
    completions = engine.generate(requests)
    return [
        {
            "kind": kind,
            "prompt": text,
            "text": completion.error or visible_text(tokenizer, completion.ids),
            "tokens": len(completion.ids),
            "stop_reason": completion.stop_reason,
        }
        for (kind, text, _), completion in zip(asked, completions, strict=True)
    ]

"""A reply of the chat format as a reader sees it."""

from nanochat.data.tokenizer import Tokenizer


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Where a reply, or a continuation of text, ends."""
    return [tokenizer.special(name) for name in ("<|assistant_end|>", "<|user_start|>", "<|user_end|>", "<|bos|>")]


def visible_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of the ids; a tool call is shown as `[17*23 = 391]`, other special tokens are left out.

    Never shrinks as ids are added, but for a character whose bytes are not all there yet: so a reply can be streamed.
    """
    marks = {
        tokenizer.special("<|python_start|>"): "[",
        tokenizer.special("<|python_end|>"): "",
        tokenizer.special("<|output_start|>"): " = ",
        tokenizer.special("<|output_end|>"): "]",
    }
    special = set(tokenizer.special_tokens.values())
    pieces = []
    for place, token in enumerate(ids):
        if token not in special:
            pieces.append(tokenizer.decode_bytes([token]))
            continue
        mark = marks.get(token, "")
        # A call that got no answer ends with its own bracket.
        if token == tokenizer.special("<|python_end|>") and place + 1 < len(ids):
            mark = "" if ids[place + 1] == tokenizer.special("<|output_start|>") else "]"
        pieces.append(mark.encode())
    return b"".join(pieces).decode(errors="replace")


def reply_parts(tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, str]]:
    """The reply as content of an assistant's message, to go on with the conversation; special tokens of no part are dropped."""
    opening = {tokenizer.special(f"<|{kind}_start|>"): kind for kind in ("python", "output")}
    closing = {tokenizer.special(f"<|{kind}_end|>") for kind in ("python", "output")}
    special = set(tokenizer.special_tokens.values())
    parts: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids:
        if token in opening:
            parts.append((opening[token], []))
        elif token in closing:
            parts.append(("text", []))
        elif token not in special:
            parts[-1][1].append(token)
    found = [{"type": kind, "text": tokenizer.decode(tokens)} for kind, tokens in parts if tokens or kind != "text"]
    return found or [{"type": "text", "text": ""}]

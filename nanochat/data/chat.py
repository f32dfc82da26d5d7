"""The format of a conversation: messages to tokens, and which of them carry loss.

    <|bos|><|user_start|>What is 2 + 3?<|user_end|>
    <|assistant_start|>Let me see. <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>It is 5.<|assistant_end|>

A message is {"role": "system" | "user" | "assistant", "content": text}; what the assistant says may also be a list of parts
{"type": "text" | "python" | "output", "text": text}. A system message is put in front of the first user message.
Loss is on what the model itself must say: the assistant's text, its calls and <|assistant_end|>, not a tool's output.
"""

from typing import Any

from nanochat.data.tokenizer import Tokenizer

Message = dict[str, Any]
PART_TYPES = ("text", "python", "output")


def render(tokenizer: Tokenizer, messages: list[Message], max_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """ids and mask of a conversation, of equal length; mask 1 where the token carries loss. Cut to `max_tokens`.

    Raises ValueError where the messages are not of the format.
    """
    ids, mask = [tokenizer.bos_id], [0]

    def add(tokens: list[int], loss: int) -> None:
        ids.extend(tokens)
        mask.extend([loss] * len(tokens))

    for message in merged_system(messages):
        if message["role"] == "user":
            add([tokenizer.special("<|user_start|>")], 0)
            add(tokenizer.encode(message["content"]), 0)
            add([tokenizer.special("<|user_end|>")], 0)
            continue
        add([tokenizer.special("<|assistant_start|>")], 0)
        for part in parts_of(message):
            tokens = tokenizer.encode(part["text"])
            if part["type"] == "text":
                add(tokens, 1)
                continue
            loss = int(part["type"] == "python")
            add([tokenizer.special(f"<|{part['type']}_start|>")], loss)
            add(tokens, loss)
            add([tokenizer.special(f"<|{part['type']}_end|>")], loss)
        add([tokenizer.special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """ids of a conversation that ends with the user, and <|assistant_start|>: what the model answers to."""
    ids, _ = render(tokenizer, messages)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; a prompt ends with the user's")
    return [*ids, tokenizer.special("<|assistant_start|>")]


def parts_of(message: Message) -> list[dict[str, str]]:
    """Content as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: Message) -> str:
    """What a reader sees: the text parts joined."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def merged_system(messages: list[Message]) -> list[Message]:
    """The same conversation without a system message of its own. Raises ValueError as `require_format`."""
    require_format(messages)
    if messages[0]["role"] != "system":
        return messages
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def require_format(messages: Any) -> None:
    """ValueError, in words for a user, unless this is a conversation of the format."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation is a list of messages and not empty")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError("a message is an object with the keys role and content")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("a system message alone is no conversation")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise ValueError(f"message {i + 1} is of role {message['role']!r} where {expected!r} must follow")
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            continue
        if message["role"] != "assistant" or not isinstance(content, list):
            raise ValueError(f"the content of a {message['role']} message must be a string")
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") not in PART_TYPES
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(f"a part is an object with a type of {', '.join(PART_TYPES)} and a text")

"""Talk to a model in the terminal.

Reads  -m results/sft and the tokenizer of its run (results/tokenizer)
The model sees the whole conversation; what no longer fits is forgotten from its start. /reset begins a new one, Ctrl-C stops a
reply, Ctrl-D or /quit ends the program.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TextIO

from nanochat import hardware
from nanochat.data.chat import Message, render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.infer.engine import Engine
from nanochat.infer.reply import reply_parts, stop_ids, visible_text
from nanochat.infer.requests import Request
from nanochat.infer.sampling import Sampling
from nanochat.model.files import load_model, read_config

UNFINISHED = "\ufffd"  # what a character looks like while some of its bytes are missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="results/sft", help="folder of a trained stage (default: %(default)s)")
    parser.add_argument("--tokenizer", help="folder of its tokenizer (default: `tokenizer` beside the model's folder)")
    parser.add_argument("-q", "--question", help="answer this one question and end")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most probable token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="among so many tokens; 0: all (default: 50)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="among the most probable that hold this share (default: 1)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="longest reply (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the first reply, one more for each that follows")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def run(arguments: argparse.Namespace) -> None:
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if problem := sampling.problem():
        raise UserError(f"{problem}.")
    model_folder = Path(arguments.model)
    if not (model_folder / "config.json").exists():
        inside = ", ".join(str(path.parent) for path in sorted(model_folder.glob("*/model.safetensors")))
        wanted = f"It has {inside}" if inside else "Name the folder of a stage, like results/sft"
        raise UserError(f"-m {arguments.model}: holds no model. {wanted}.")
    tokenizer = Tokenizer.load(arguments.tokenizer or model_folder.resolve().parent / "tokenizer")
    device = hardware.pick_device(0 if arguments.cpu else None)
    dtype = hardware.resolve_dtype("auto", device)
    model = load_model(arguments.model, device, dtype, tokenizer_sha256=tokenizer.sha256)
    if read_config(arguments.model).get("stage") == "base":
        print("This model is pretrained only: it goes on with text and has not learnt to answer.", file=sys.stderr)
    session = Session(Engine(model, tokenizer), tokenizer, sampling, arguments.max_tokens, arguments.seed)
    if arguments.question is not None:
        for piece in session.reply(arguments.question):
            print(piece, end="", flush=True)
        print()
        return
    converse(session, sys.stdin, sys.stdout)


def converse(session: "Session", source: TextIO, target: TextIO) -> None:
    """Read lines and answer them until the input ends."""
    print("Ctrl-C stops a reply, /reset begins anew, Ctrl-D ends.", file=target)
    while True:
        print("\nyou> ", end="", file=target, flush=True)
        try:
            line = source.readline()
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", file=target)
            continue
        if not line or line.strip() == "/quit":
            print(file=target)
            return
        if line.strip() == "/reset":
            session.reset()
            print("(a new conversation)", file=target)
        elif line.strip().startswith("/"):
            print(f"({line.strip()}: no such command; /reset, /quit)", file=target)
        elif line.strip():
            print("bot> ", end="", file=target, flush=True)
            _say(session, line.strip(), target)


def _say(session: "Session", line: str, target: TextIO) -> None:
    try:
        # Closed at once when interrupted, so that what was said until then is remembered.
        with closing(session.reply(line)) as pieces:
            for piece in pieces:
                print(piece, end="", file=target, flush=True)
        print(file=target)
    except KeyboardInterrupt:
        print(" (stopped)", file=target)
    except UserError as error:
        print(f"({error})", file=target)


class Session:
    """A conversation: what was said, and how replies are drawn."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, max_tokens: int, seed: int):
        self.engine, self.tokenizer, self.sampling = engine, tokenizer, sampling
        self.max_tokens, self.seed = max_tokens, seed
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def reply(self, text: str) -> Iterator[str]:
        """The pieces of the reply as they come. Stopped half-way, the part that was said belongs to the conversation.

        Raises UserError when not even this message alone leaves room for a reply.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        while len(prompt) >= self.engine.length - self._room() and len(messages) > 1:
            messages = messages[2:]
            prompt = self._prompt(messages)
        room = self.engine.length - len(prompt)
        if room < 1:
            raise UserError(
                f"your message is {len(prompt)} tokens long, the model sees {self.engine.length}. Shorten it."
            )
        request = Request(
            prompt,
            min(self.max_tokens, room),
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.seed,
            stop_ids=stop_ids(self.tokenizer),
            calculator=True,
        )
        self.seed += 1
        ids: list[int] = []
        shown = ""
        try:
            for token in self.engine.stream(request):
                ids.append(token)
                whole = visible_text(self.tokenizer, ids).rstrip(UNFINISHED)
                if len(whole) > len(shown):
                    piece, shown = whole[len(shown) :], whole
                    yield piece
            rest = visible_text(self.tokenizer, ids)[len(shown) :]
            if rest:
                yield rest
        finally:
            self.messages = [*messages, {"role": "assistant", "content": reply_parts(self.tokenizer, ids)}]

    def _prompt(self, messages: list[Message]) -> list[int]:
        return render_prompt(self.tokenizer, messages)

    def _room(self) -> int:
        """Tokens that a reply should find free: what it may take, but no more than a quarter of the context."""
        return min(self.max_tokens, self.engine.length // 4)

"""What is asked of the engine, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.infer.sampling import Sampling

MAX_STOP_IDS = 8
StopReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """Continue one prompt, `samples` times. The defaults are one greedy continuation."""

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: Sequence[int] = ()  # generation ends before one of these
    samples: int = 1
    calculator: bool = False  # answer the tool calls of the chat format

    def sampling(self, sample: int) -> Sampling:
        """Settings of one of the samples; each has a seed of its own, and sample 0 that of the request."""
        seed = self.seed + sample * 0x9E3779B1
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed)

    def problem(self, vocab_size: int, length: int) -> str | None:
        """Why it cannot be served by a cache of `length` positions, with what would be right; None when it can."""
        if len(self.prompt) == 0:
            return "prompt: empty. Give at least one token, <|bos|> for instance"
        if min(self.prompt) < 0 or max(self.prompt) >= vocab_size:
            outside = next(token for token in self.prompt if not 0 <= token < vocab_size)
            return f"prompt: token id {outside} is outside the vocabulary of {vocab_size:,} (0 to {vocab_size - 1:,})"
        if self.max_new_tokens < 1:
            return f"max_new_tokens = {self.max_new_tokens}: must be 1 or more"
        if self.samples < 1:
            return f"samples = {self.samples}: must be 1 or more"
        if len(self.prompt) >= length:
            return f"prompt: {len(self.prompt):,} tokens leave no room in a context of {length:,}. Shorten it"
        if len(self.prompt) + self.max_new_tokens > length:
            return (
                f"max_new_tokens = {self.max_new_tokens:,}: with the {len(self.prompt):,} tokens of the prompt longer than "
                f"the context of {length:,}. At most {length - len(self.prompt):,}"
            )
        if len(self.stop_ids) > MAX_STOP_IDS:
            return f"stop_ids: {len(self.stop_ids)} given, at most {MAX_STOP_IDS}"
        return self.sampling(0).problem()


@dataclass(frozen=True)
class Completion:
    """One sample of one request."""

    request: int  # index of the request
    sample: int  # 0 to samples - 1
    ids: list[int]  # without the stop token; with the calculator's output
    stop_reason: StopReason
    error: str | None = None


@dataclass(frozen=True)
class Scored:
    """How probable a given continuation is."""

    logprob: float  # nats, of all its tokens
    token_logprobs: list[float]
    greedy: bool  # each token is the model's first choice

"""Log-probabilities of given continuations, many at a time: what evaluation asks most."""

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.infer.requests import Scored
from nanochat.model.gpt import GPT
from nanochat.model.loss import chunk_tokens, softcapped_logits

# Positions in one forward pass: enough to keep the device busy, few enough for its memory.
PASS_TOKENS = {"cuda": 65_536, "cpu": 4_096}


@torch.no_grad()
def logprobs(model: GPT, pairs: list[tuple[list[int], list[int]]], length: int) -> list[Scored]:
    """log p(continuation | context) of each pair (context ids, continuation ids), in their order.

    Continuations of one token share the pass of their context: the letters of a multiple-choice question cost one row.
    Only positions that predict a token of a continuation go through the output head.
    Raises UserError when a context or continuation is empty or both together are longer than `length`.
    """
    rows: dict[tuple[int, ...], int] = {}  # tokens fed -> row
    feeds = []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise UserError(f"pair {number}: the context and the continuation must each have at least one token.")
        if len(context) + len(continuation) > length + 1:
            raise UserError(
                f"pair {number}: {len(context)} + {len(continuation)} tokens are more than the context of {length}. Cut it."
            )
        feed = (*context, *continuation[:-1])
        rows.setdefault(feed, len(rows))
        feeds.append(feed)
    by_row: list[list[int]] = [[] for _ in rows]  # the pairs that a row serves
    for number, feed in enumerate(feeds):
        by_row[rows[feed]].append(number)
    tokens = list(rows)
    results: list[Scored | None] = [None] * len(pairs)
    for batch in _batches([len(feed) for feed in tokens], PASS_TOKENS[model.device.type]):
        hidden = model.hidden(_padded([tokens[row] for row in batch], model.device))  # (B, T, C)
        wanted = [(i, number) for i, row in enumerate(batch) for number in by_row[row]]
        row_index, column, target = [], [], []
        for i, number in wanted:
            context, continuation = pairs[number]
            row_index += [i] * len(continuation)
            column += range(len(context) - 1, len(context) - 1 + len(continuation))
            target += continuation
        picked = hidden[torch.tensor(row_index, device=hidden.device), torch.tensor(column, device=hidden.device)]
        values, firsts = _score(model, picked, torch.tensor(target, device=hidden.device))
        done = 0
        for _, number in wanted:
            part = slice(done, done + len(pairs[number][1]))
            results[number] = Scored(sum(values[part]), values[part], all(firsts[part]))
            done = part.stop
    return results


def _score(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """For N positions (N, C): log p of the target (N,) and whether it is the most probable token."""
    values, firsts = [], []
    size = chunk_tokens(model.config.vocab_size, model.device)
    for x, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = softcapped_logits(x, model.head, model.config.logit_softcap)  # (n, V)
        chosen = logits.gather(-1, target[:, None])[:, 0]
        values.append(chosen - logits.logsumexp(-1))
        firsts.append(logits.argmax(-1) == target)
    return torch.cat(values).tolist(), torch.cat(firsts).tolist()


def _batches(lengths: list[int], most_tokens: int) -> list[list[int]]:
    """Rows of similar length together, at most `most_tokens` positions a pass, padding included."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= most_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _padded(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """(B, T) int64, zeros behind the shorter rows: with causal attention nothing before them sees them."""
    width = max(len(row) for row in rows)
    return torch.tensor([(*row, *[0] * (width - len(row))) for row in rows], device=device)

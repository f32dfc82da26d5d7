"""How many rows fit: arithmetic from the sizes, before anything is allocated."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.model.gpt import GPTConfig

PREFILL_ROWS = 32  # prompts computed side by side, at most
LOGIT_COPIES = 4  # float32 (R, V) tensors alive at once in a step: logits, scaled, noise, the sort of top-p


def row_bytes(config: "GPTConfig", length: int, itemsize: int) -> int:
    """Keys and values of one row of `length` positions; itemsize is the cache's, in bytes."""
    return 2 * config.depth * config.kv_heads * (config.width // config.heads) * length * itemsize


def engine_bytes(config: "GPTConfig", rows: int, length: int, itemsize: int) -> int:
    """All that an engine allocates beside the weights: the cache, the prefill's scratch and shared prefix, a step's logits."""
    caches = (rows + min(rows, PREFILL_ROWS) + 1) * row_bytes(config, length, itemsize)
    return caches + LOGIT_COPIES * 4 * rows * config.vocab_size


def rows_that_fit(config: "GPTConfig", length: int, itemsize: int, memory_bytes: int) -> int:
    """The most rows whose `engine_bytes` are within that memory; 0 when not even one fits."""
    low, high = 0, 1
    while engine_bytes(config, high, length, itemsize) <= memory_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if engine_bytes(config, middle, length, itemsize) <= memory_bytes:
            low = middle
        else:
            high = middle
    return low

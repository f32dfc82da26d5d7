"""How many rows fit: arithmetic from the sizes, before anything is allocated. The formulas are hardware.py's."""

from typing import TYPE_CHECKING

from nanochat import hardware
from nanochat.hardware import DRAWN_ROWS, MOST_PROMPTS, PREFILL_ROWS, PREFILL_TOKENS

if TYPE_CHECKING:
    from nanochat.model.gpt import GPTConfig

__all__ = [
    "DRAWN_ROWS", "MOST_PROMPTS", "PREFILL_ROWS", "PREFILL_TOKENS", "engine_bytes", "row_bytes", "rows_that_fit"
]  # fmt: skip


def row_bytes(config: "GPTConfig", length: int, itemsize: int) -> int:
    """Keys and values of one row of `length` positions; itemsize is the cache's, in bytes."""
    return hardware.kv_cache_bytes(config, length, itemsize)


def engine_bytes(config: "GPTConfig", rows: int, length: int, itemsize: int) -> int:
    """All that an engine allocates beside the weights."""
    return hardware.decode_bytes(config, config.vocab_size, rows, length, itemsize)


def rows_that_fit(config: "GPTConfig", length: int, itemsize: int, memory_bytes: int) -> int:
    """The most rows whose `engine_bytes` are within that memory; 0 when not even one fits."""
    return hardware.decode_rows(config, config.vocab_size, length, itemsize, memory_bytes)

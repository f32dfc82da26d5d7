"""Rows made ahead of their use: the same rows in the same order, errors where they belong, no thread left behind."""

import threading
import time

import pytest
import torch
from training_support import PlainLoader, make_trainer

from nanochat.train.prefetch import AHEAD, Prefetched

CPU = torch.device("cpu")


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "loader"}


@pytest.mark.parametrize("count", [0, 1, AHEAD, 50])
def test_items_come_in_their_order(count):
    items = Prefetched(iter(range(count)), CPU)
    assert list(items) == list(range(count))
    with pytest.raises(StopIteration):
        next(items)
    items.close()


def test_an_error_is_raised_where_its_item_would_have_been():
    def items():
        yield from (1, 2)
        raise OSError("the disk is gone")

    made = Prefetched(items(), CPU)
    assert [next(made), next(made)] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(made)
    made.close()


def test_no_more_is_made_than_is_needed_soon():
    made, before = [], loader_threads()

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    items = Prefetched(items(), CPU)
    next(items)
    time.sleep(0.1)
    assert len(made) <= AHEAD + 2
    items.close()
    assert loader_threads() == before


def test_waiting_is_counted_and_work_done_meanwhile_is_not():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    waited = Prefetched(slow(), CPU)
    assert list(waited) == [0, 1, 2]
    assert 0.1 < waited.waited_seconds < 0.5
    beside = Prefetched(slow(), CPU)
    time.sleep(0.4)
    assert list(beside) == [0, 1, 2]
    assert beside.waited_seconds < 0.05


def test_the_thread_ends_with_the_trainer_also_when_it_fails(tmp_path):
    before = loader_threads()
    make_trainer(tmp_path / "a", steps=3).run()
    assert loader_threads() == before

    class Broken(PlainLoader):
        def micro_batch(self, step, first_row, rows):
            if step == 2:
                raise OSError("shard gone")
            return super().micro_batch(step, first_row, rows)

    trainer = make_trainer(tmp_path / "b", steps=5, loader=Broken())
    with pytest.raises(OSError, match="shard gone"):
        trainer.run()
    assert trainer.step == 2, "the steps before the broken one are done"
    assert loader_threads() == before

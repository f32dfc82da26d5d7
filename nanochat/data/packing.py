"""Packing conversations in rows of fixed length: whole ones, best fit, no token lost."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Which conversations stand in which row, and what that costs."""

    rows: list[list[int]]
    padding_fraction: float  # of all places
    truncated: int  # conversations longer than a row, cut to its length


def pack(lengths: Sequence[int], row_length: int, seed: int = 0) -> Packed:
    """Best fit decreasing: the longest first, each where it leaves the least room.

    lengths  tokens of each conversation; one that is longer than a row takes a whole one and is cut
    Rows, and the conversations in a row, come in an order drawn from the seed: the longest is not always in front.
    """
    sizes = np.minimum(np.asarray(lengths, dtype=np.int64), row_length)
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # its keys, sorted
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(item)
        left = room - size
        if left in by_room:
            by_room[left].append(row)
        elif left > 0:
            by_room[left] = [row]
            bisect.insort(rooms, left)
    random = np.random.default_rng(seed)
    rows = [[rows[row][i] for i in random.permutation(len(rows[row]))] for row in random.permutation(len(rows))]
    places = len(rows) * row_length
    return Packed(
        rows, 1 - float(sizes.sum()) / places if places else 0.0, int((np.asarray(lengths) > row_length).sum())
    )

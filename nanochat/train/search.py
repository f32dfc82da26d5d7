"""How many rows fit, and with how many training is fastest, from as few probes as possible.

Memory grows along a line in the rows. So two probes predict which candidate is the largest that fits; that one is probed and
so verifies the line. Where the line does not hold (kinks, noise, a device that is shared) what is left is growth by
factors and bisection, which need no law at all.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Below this difference the smaller batch wins: it leaves memory free. Two timings of one size lie up to 1.3% apart on an H100, most
# of them less: so it must win twice, and half of the difference is left to what noise remains.
SAME_SPEED, NOISE = 0.01, 0.005
PAYS = 0.03  # a gain from more rows that counts: on a CPU growth goes on for it; a step too small for it is named
START = 0.8  # of the rows that might fit: the first probe runs, and is one of the two largest candidates that do
TIMED = 2  # so many of the largest candidates are always timed
STRAIGHT = 0.03  # a line that predicts the largest probe this well holds
# What is predicted to be this little too large is tried all the same: by a line that holds, beyond what it was off; without one.
NEARLY, UNSURE = 0.01, 0.10
GROWTH = 4  # no probe is larger than so many times the largest that ran


@dataclass(frozen=True)
class Probe:
    """One size tried. ok: it ran; whether it leaves the margin free is another question. peak_bytes and speed only then.

    timings  how many tokens_per_second is the mean of
    """

    device_batch_size: int
    ok: bool
    peak_bytes: int | None
    tokens_per_second: float | None
    seconds: float
    note: str | None = None
    timings: int = 1


@dataclass(frozen=True)
class Found:
    """The end of a search. chosen None: nothing fits. largest: rows that fit, whether or not they divide a step.

    off  by how much the line missed the largest probe, as a share; None with fewer than three points
    """

    chosen: Probe | None
    largest: int | None
    largest_was_probed: bool
    off: float | None
    probes: list[Probe]
    reason: str


def peak_at(size: int, peaks: dict[int, int]) -> float:
    """Peak bytes at a size between the probed ones, along straight lines; outside of them along the nearest two.

    peaks  bytes by size, of the sizes that ran; one at least
    """
    if size in peaks or len(peaks) == 1:
        return peaks.get(size, next(iter(peaks.values())))
    sizes = sorted(peaks)
    pairs = list(itertools.pairwise(sizes))
    low, high = next(((a, b) for a, b in pairs if size < b), pairs[-1])
    return peaks[low] + (peaks[high] - peaks[low]) * (size - low) / (high - low)


class Tried:
    """What is known: every size is probed once, and once more where its speed decides."""

    def __init__(self, probe: Callable[[int], Probe], limit_bytes: int, known: Iterable[Probe] = ()):
        self.probe, self.limit_bytes = probe, limit_bytes
        self.probes = {one.device_batch_size: one for one in known}

    def fits(self, size: int) -> bool:
        if size not in self.probes:
            self.probes[size] = self.probe(size)
        return self.known_to_fit(size)

    def time_again(self, size: int) -> bool:
        """Whether it was to be timed again: it has one timing so far."""
        if self.probes[size].timings > 1:
            return False
        self.probes[size] = self.probe(size)
        return True

    def known_to_fit(self, size: int) -> bool:
        one = self.probes.get(size)
        return one is not None and one.ok and one.peak_bytes <= self.limit_bytes

    @property
    def peaks(self) -> dict[int, int]:
        """Bytes of the sizes that ran, also of those that leave no margin."""
        return {size: self.probes[size].peak_bytes for size in sorted(self.probes) if self.probes[size].ok}

    @property
    def too_large(self) -> float:
        """The smallest size known not to fit."""
        return min((size for size in self.probes if not self.known_to_fit(size)), default=math.inf)

    @property
    def off(self) -> float | None:
        """The error of the line through the third and second largest points at the largest one."""
        if len(self.peaks) < 3:
            return None
        *below, largest = sorted(self.peaks)[-3:]
        return abs(peak_at(largest, {n: self.peaks[n] for n in below}) / self.peaks[largest] - 1)

    @property
    def is_straight(self) -> bool:
        return self.off is not None and self.off <= STRAIGHT

    @property
    def line_failed(self) -> bool:
        """It says that a size fits which ran out of memory."""
        size = self.too_large
        return size in self.probes and not self.probes[size].ok and peak_at(int(size), self.peaks) <= self.limit_bytes


def search(
    probe: Callable[[int], Probe],
    candidates: list[int],
    limit_bytes: int,
    most: int,
    guess: int,
    known: Iterable[Probe] = (),
) -> Found:
    """The fastest candidate whose peak stays below the limit.

    probe       tries a size; called once for each, and a second time, for the mean of both timings, where two are about as fast
    candidates  ascending, beginning with 1: the sizes that a step can be split into
    most        largest size worth trying
    guess       how many rows might fit: where to begin, nothing more
    known       probes of earlier searches
    """
    tried = Tried(probe, limit_bytes, known)
    low = _largest_candidate(tried, candidates, guess)
    if not low:
        return Found(None, None, False, tried.off, list(tried.probes.values()), "nothing fits")
    for size in [n for n in candidates if n <= low][-TIMED:]:
        tried.fits(size)
    _until_larger_is_faster(tried, candidates)
    _until_a_tie_is_sure(tried, candidates)
    low = max((n for n in candidates if tried.known_to_fit(n)), default=0)
    if not low:  # what ran once did not run again
        return Found(None, None, False, tried.off, list(tried.probes.values()), "nothing fits")
    largest = _most_rows(tried, low, most, candidates[-1])
    return _chosen(tried, candidates, largest)


def search_while_it_pays(
    probe: Callable[[int], Probe], candidates: list[int], limit_bytes: int, first: int, known: Iterable[Probe] = ()
) -> Found:
    """On a CPU memory is no limit and large batches fall out of its cache: grow until a larger batch is no faster."""
    tried = Tried(probe, limit_bytes, known)
    start = max((n for n in candidates if n <= first), default=candidates[0])
    while not tried.fits(start):
        if start == candidates[0]:
            return Found(None, None, False, None, list(tried.probes.values()), "nothing fits")
        start = max((n for n in candidates if n <= start // 2), default=candidates[0])
    sizes, fastest = [start], tried.probes[start].tokens_per_second
    for size in candidates:
        if size < 2 * sizes[-1] and not (size == candidates[-1] > sizes[-1]):
            continue
        if not tried.fits(size):
            break
        speed = tried.probes[size].tokens_per_second
        sizes.append(size)
        if speed < fastest * (1 + PAYS):
            found = _chosen(tried, candidates, size)
            return Found(**vars(found) | {"reason": f"{found.reason}; larger ones no longer gain"})
        fastest = speed
    return _chosen(tried, candidates, sizes[-1])


def _largest_candidate(tried: Tried, candidates: list[int], guess: int) -> int | None:
    """The largest candidate that fits, None when none does."""
    if len(tried.peaks) < 2:
        start = max((n for n in candidates if n <= START * guess and n < tried.too_large), default=candidates[0])
        if tried.fits(start) and start > 1:
            tried.fits(max(n for n in candidates if n <= start // 2))
    while True:
        low = max((n for n in candidates if tried.known_to_fit(n)), default=0)
        between = [n for n in candidates if low < n < tried.too_large]
        size = _next(tried, between) if between else None
        if size is None:
            return low or None
        tried.fits(size)


def _next(tried: Tried, between: list[int]) -> int | None:
    """Which of these candidates to try; None when the line says that none of them fits."""
    peaks = tried.peaks
    if len(peaks) < 2:
        if tried.too_large < math.inf:
            return max((n for n in between if n <= tried.too_large // 2), default=between[0])
        return next((n for n in between if n >= 2 * max(peaks, default=0)), between[-1])
    if tried.line_failed:
        return between[len(between) // 2]
    fitting = [n for n in between if peak_at(n, peaks) <= tried.limit_bytes]
    if fitting:
        within_reach = [n for n in fitting if n <= GROWTH * max(peaks)]
        return within_reach[-1] if within_reach else fitting[0]
    slack = tried.off + NEARLY if tried.is_straight else UNSURE
    return between[0] if peak_at(between[0], peaks) <= tried.limit_bytes * (1 + slack) else None


def _until_larger_is_faster(tried: Tried, candidates: list[int]) -> None:
    """While the smallest candidate tried is the fastest, half of it might be faster still: large ones can lose a few percent."""
    while True:
        usable = [n for n in candidates if tried.known_to_fit(n)]
        fastest = max(usable, key=lambda n: tried.probes[n].tokens_per_second)
        smaller = [n for n in candidates if n <= usable[0] // 2]
        if fastest > usable[0] or not smaller or not tried.fits(smaller[-1]):
            return


def _until_a_tie_is_sure(tried: Tried, candidates: list[int]) -> None:
    """A smaller size that would be preferred to the fastest, and the fastest, are timed twice."""
    while True:
        usable = [tried.probes[n] for n in candidates if tried.known_to_fit(n)]
        if not usable:
            return
        chosen, fastest = _preferred(usable), max(usable, key=lambda one: one.tokens_per_second)
        if chosen is fastest:
            return
        timed = [tried.time_again(one.device_batch_size) for one in (chosen, fastest)]
        if not any(timed):
            return


def _preferred(usable: list[Probe]) -> Probe:
    """The smallest of the sizes (ascending) that are about as fast as the fastest."""
    fastest = max(one.tokens_per_second for one in usable)
    return next(one for one in usable if one.tokens_per_second >= fastest * (1 - SAME_SPEED + NOISE))


def _most_rows(tried: Tried, low: int, most: int, of_use: int) -> int:
    """The most rows that fit: by a line that holds, otherwise tried, until what fits is more than a step can use."""
    low = max([low, *(n for n in tried.probes if n <= most and tried.known_to_fit(n))])
    while True:
        end = min(most + 1, tried.too_large)
        if len(tried.peaks) < 2 or tried.line_failed:
            size = (low + end) // 2
        else:
            size = max((n for n in range(low, end) if peak_at(n, tried.peaks) <= tried.limit_bytes), default=low)
            size = min(size, GROWTH * max(tried.peaks))
            if tried.is_straight and size <= 3 * max(tried.peaks):
                return size
        if size == low or end - low <= max(1, low // 16) or low > of_use:
            return low
        if tried.fits(size):
            low = size


def _chosen(tried: Tried, candidates: list[int], largest: int) -> Found:
    usable = [tried.probes[n] for n in candidates if tried.known_to_fit(n)]
    fastest = max(one.tokens_per_second for one in usable)
    chosen = _preferred(usable)
    sizes = ", ".join(str(one.device_batch_size) for one in usable)
    reason = f"{chosen.tokens_per_second:,.0f} tokens/s, the fastest of {sizes} rows"
    if chosen.tokens_per_second < fastest:
        reason += f", but for less than {SAME_SPEED:.0%}"
    if tried.too_large < math.inf or largest > max(candidates):
        reason += f"; {largest} rows fit in memory"
    # What no split of a step reaches was tried for its memory; that it is faster says something of the step.
    larger = [one for n, one in tried.probes.items() if n > max(candidates) and tried.known_to_fit(n)]
    best = max(larger, key=lambda one: one.tokens_per_second, default=None)
    if best and best.tokens_per_second > fastest * (1 + PAYS):
        reason += f"; {best.device_batch_size} rows would reach {best.tokens_per_second:,.0f} tokens/s, for which tokens_per_step is too small"
    return Found(chosen, largest, largest in tried.probes, tried.off, list(tried.probes.values()), reason)

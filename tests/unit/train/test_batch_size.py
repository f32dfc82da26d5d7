"""The search over made-up memory laws, the cache, and a real measurement."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_support import LENGTH, MODEL, VOCAB

from nanochat import config
from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.train import batch_size
from nanochat.train.batch_size import Probe, make_plan, run_probe, search


def settings(cache: Path | str = "", **values) -> config.PlanSettings:
    return config.PlanSettings(
        **{
            "stage": "base",
            "model": MODEL.resolved(),
            "vocab_size": VOCAB,
            "gpus": 0,
            "sequence_length": LENGTH,
            "tokens_per_step": 12 * LENGTH,
            "device_batch_size": None,
            "dtype": "float32",
            "compile": "off",
            "batch_size": config.BatchSize(cache=str(cache)),
        }
        | values
    )


class Law:
    """A device that is not there: memory and speed as functions of the rows."""

    def __init__(self, capacity, per_row=10.0, fixed=100.0, noise=0.0, step=1, speed=lambda n: float(n)):
        self.capacity, self.per_row, self.fixed, self.noise, self.step = capacity, per_row, fixed, noise, step
        self.speed, self.tried = speed, []

    def peak(self, n: int) -> int:
        rounded = -(-n // self.step) * self.step  # allocators round up: memory grows in steps
        return int(self.fixed + self.per_row * rounded + self.noise * (n * 7919 % 13) / 13)

    def __call__(self, n: int) -> Probe:
        assert n not in self.tried, "a size was tried twice"
        self.tried.append(n)
        if self.peak(n) > self.capacity:
            return Probe(n, False, None, None, 1.0, "out of memory")
        return Probe(n, True, self.peak(n), self.speed(n), 1.0)


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


@given(
    rows=st.integers(1, 300),
    capacity=st.integers(50, 4000),
    noise=st.floats(0, 30),
    step=st.integers(1, 9),
    most=st.integers(1, 512),
)
def test_what_is_chosen_fits_and_divides(rows, capacity, noise, step, most):
    law = Law(capacity, noise=noise, step=step)
    limit = int(capacity * 0.85)
    candidates = [n for n in divisors(rows) if n <= most]
    found = search(law, candidates, limit, most)
    if law.peak(1) > limit:
        assert found.chosen is None
        return
    assert rows % found.chosen.device_batch_size == 0
    assert law.peak(found.chosen.device_batch_size) <= limit
    assert law.peak(found.largest) <= limit
    fitting = [n for n in range(1, most + 1) if all(law.peak(m) <= limit for m in range(1, n + 1))]
    assert found.largest >= 0.93 * max(fitting) - 1
    best = max(n for n in candidates if n <= found.largest)
    assert found.chosen.device_batch_size == best  # here speed grows with the rows


def test_the_fastest_is_chosen_not_the_largest():
    found = search(Law(1e9, speed=lambda n: {16: 900.0, 32: 1000.0, 64: 800.0}.get(n, 10.0)), divisors(64), 10**9, 64)
    assert found.chosen.device_batch_size == 32


def test_within_one_percent_the_smaller_is_chosen():
    found = search(Law(1e9, speed=lambda n: 100.0 + n / 100), divisors(64), 10**9, 64)
    assert found.chosen.device_batch_size == min(p.device_batch_size for p in found.probes)


def test_growth_on_a_cpu_ends_where_it_no_longer_pays():
    law = Law(1e9, speed=lambda n: float(min(n, 8)))
    found = search(law, divisors(512), 10**9, 512, first=4, while_it_pays=True)
    assert law.tried == [4, 8, 16]
    assert found.chosen.device_batch_size == 8


def test_growth_starts_smaller_when_its_start_does_not_fit():
    law = Law(capacity=135)
    found = search(law, divisors(64), 135, 64, first=16, while_it_pays=True)
    assert found.chosen.device_batch_size == 2


def test_only_one_row_fits():
    assert search(Law(115), divisors(64), 115, 64).chosen.device_batch_size == 1


def test_a_prime_number_of_rows_leaves_one():
    assert search(Law(capacity=300), divisors(127), 300, 512).chosen.device_batch_size == 1


def test_nothing_fits_is_an_error_that_says_what_to_shrink(monkeypatch):
    monkeypatch.setattr(batch_size, "run_probe", lambda *_: Probe(1, False, None, None, 1.0, "out of memory"))
    with pytest.raises(UserError, match=r"train\.base.*out of memory.*Lower train\.base\.sequence_length"):
        make_plan(settings())


def test_override_is_honoured_and_recorded():
    plan = make_plan(settings(device_batch_size=4))
    assert (plan["device_batch_size"], plan["grad_accum_steps"], plan["source"]) == (4, 3, "override")
    with pytest.raises(UserError, match=r"device_batch_size = 5.*1, 2, 3, 4, 6, 12"):
        make_plan(settings(device_batch_size=5))


def test_tokens_that_no_row_divides_are_refused():
    with pytest.raises(UserError, match=r"train\.base\.tokens_per_step = 100.*Nearest: 96 or 112"):
        make_plan(settings(tokens_per_step=100))


@pytest.fixture
def law(monkeypatch):
    law = Law(10**12, speed=lambda n: float(n))
    monkeypatch.setattr(batch_size, "run_probe", lambda path, size, capacity, timeout: law(size))
    return law


def test_a_second_search_comes_from_the_cache(tmp_path, law):
    first = make_plan(settings(tmp_path))
    again = make_plan(settings(tmp_path, stage="mid"))
    assert (first["source"], again["source"], again["stage"]) == ("measured", "cache", "mid")
    assert again["device_batch_size"] == first["device_batch_size"] == 12
    law.tried.clear()
    assert make_plan(settings(tmp_path), use_cache=False)["source"] == "measured"
    law.tried.clear()
    assert make_plan(settings(tmp_path, dtype="bfloat16"))["source"] == "measured"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"key": "other"}', '{"key": "KEY", "device_batch_size": 5, "grad_accum_steps": 5}']
)
def test_a_corrupt_or_foreign_cache_is_measured_anew(tmp_path, law, content, capfd):
    make_plan(settings(tmp_path))
    (path,) = tmp_path.glob("*.json")
    path.write_text(content.replace("KEY", path.stem))
    law.tried.clear()
    assert make_plan(settings(tmp_path))["source"] == "measured"
    assert "measuring again" in capfd.readouterr().err
    assert read_json(path)["device_batch_size"] == 12


def test_two_jobs_may_write_the_cache_at_once(tmp_path):
    """A reader sees one plan or the other, never a mixture."""
    path = tmp_path / "k.json"
    job = f"""
import sys
from nanochat.files import write_json
for i in range(60):
    size = int(sys.argv[1])
    write_json({str(path)!r}, {{"key": "k", "device_batch_size": size, "grad_accum_steps": 12 // size, "filler": "x" * 99999}})
"""
    jobs = [subprocess.Popen([sys.executable, "-c", job, size]) for size in ("3", "4")]
    while not path.exists():
        assert jobs[0].poll() in (None, 0)
    complaints = []
    while any(process.poll() is None for process in jobs):
        assert batch_size.read_cache(path, "k", 12, complaints.append)["device_batch_size"] in (3, 4)
    assert [process.returncode for process in jobs] == [0, 0]
    assert not complaints
    assert [p.name for p in tmp_path.iterdir()] == ["k.json"]


@pytest.mark.slow
def test_a_real_measurement_gives_a_plan(tmp_path):
    plan = make_plan(settings(tmp_path))
    assert plan["source"] == "measured"
    assert plan["device_batch_size"] * plan["grad_accum_steps"] == 12
    assert 0 < plan["peak_bytes"] < plan["capacity_bytes"]
    assert all(p["ok"] and p["tokens_per_second"] > 0 for p in plan["probes"])


@pytest.mark.slow
def test_a_probe_ends_at_its_deadline_and_at_the_memory_it_may_use(tmp_path):
    write_json(tmp_path / "s.json", settings().model_dump(mode="json"))
    late = run_probe(tmp_path / "s.json", 1, 2**40, timeout_seconds=0.3)
    assert not late.ok
    assert "ended after" in late.note
    large = run_probe(tmp_path / "s.json", 1, 10 * 2**20, timeout_seconds=60)
    assert not large.ok
    assert "memory" in large.note

"""The plan: what decides it, what is kept of it, and a real measurement."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_support import LENGTH, MODEL, VOCAB

from nanochat import command_settings, config, hardware
from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train import batch_size, measured, prober
from nanochat.train.batch_size import make_plan, measure_again
from nanochat.train.measured import Measured, cache_key, mark_as_too_large
from nanochat.train.prober import DidNotRun, Prober

GIB = 2**30
GPU = hardware.Gpu("GPU-1", "Imagined 80GB", 80 * GIB, "580.1")


def settings(cache: Path | str = "", **values) -> command_settings.PlanSettings:
    own = {"cache": str(cache)} | values.pop("batch_size", {})
    return command_settings.PlanSettings(
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
            "batch_size": config.BatchSize(**own),
        }
        | values
    )


class Device:
    """In place of the probes' processes: memory along a line, speed by a function of the rows."""

    def __init__(self, per_row=GIB, fixed=2 * GIB, capacity=80 * GIB, micro_step_seconds=lambda rows: 0.1):
        self.per_row, self.fixed, self.capacity, self.micro_step_seconds = per_row, fixed, capacity, micro_step_seconds
        self.tried, self.refuses = [], None

    def __call__(self, *_, **__) -> "Device":
        return self

    def __enter__(self):
        def probe(rows: int, seconds: float = 0.0) -> dict:
            self.tried.append(rows)
            if self.refuses:
                raise DidNotRun(self.refuses)
            peak = self.fixed + rows * self.per_row
            if peak > self.capacity:
                raise DidNotRun("out of memory")
            seconds = {"micro_step_seconds": self.micro_step_seconds(rows), "optimizer_seconds": 0.02}
            return {"peak_bytes": peak, "beside_bytes": GIB // 2, "dtype": "bfloat16", **seconds}

        return probe

    def __exit__(self, *_):
        return None


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(batch_size, "Prober", device)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [GPU])
    monkeypatch.setattr(batch_size, "_guess", lambda *_: 74)  # the model here is too small for it
    return device


def on_gpu(cache: Path | str = "", rows: int = 256, **values) -> command_settings.PlanSettings:
    return settings(cache, gpus=1, tokens_per_step=rows * LENGTH, **values)


@pytest.mark.parametrize(
    ("depth", "length", "gibibytes", "most"),
    [(8, 2048, 139.8, 510), (12, 512, 79.2, 498), (12, 2048, 139.8, 230), (16, 1024, 79.2, 136), (20, 2048, 139.8, 77)],
)
def test_the_first_guess_is_near_what_fitted_on_a_gpu(depth, length, gibibytes, most):
    """Rows that filled 0.85 of an H100's or H200's memory: docs/performance.md."""
    model = config.Model(depth=depth).resolved()
    sizes = {"model": model, "vocab_size": 32_768, "sequence_length": length, "tokens_per_step": 2**19}
    usual = settings(gpus=1, dtype="auto", compile="auto", **sizes)
    assert batch_size._guess(usual, int(0.85 * gibibytes * 2**30)) == pytest.approx(most, rel=0.1)


def test_a_plan_on_a_gpu(device, tmp_path):
    plan = make_plan(on_gpu(tmp_path))
    assert (plan["device_batch_size"], plan["grad_accum_steps"], plan["source"]) == (64, 4, "measured")
    assert plan["max_device_batch_size"] == 66  # 0.85 of 80 GiB, less 2
    assert plan["capacity_bytes"] == 80 * GIB
    assert plan["peak_bytes"] == 66 * GIB
    assert plan["line_off"] < 1e-6
    assert "the fastest of" in plan["reason"]


def test_the_margin_is_kept(device):
    for margin in (0.0, 0.3, 0.6, 0.9):
        plan = make_plan(on_gpu(batch_size={"margin": margin}))
        assert plan["peak_bytes"] <= (1 - margin) * plan["capacity_bytes"]


def test_different_gpus_take_the_smallest(device, monkeypatch):
    small = hardware.Gpu("GPU-2", "Imagined 40GB", 40 * GIB, "580.1")
    monkeypatch.setattr(hardware, "visible_gpus", lambda: [GPU, small])
    device.capacity, device.fixed = 40 * GIB, GIB
    plan = make_plan(on_gpu().model_copy(update={"gpus": 2}))
    assert (plan["capacity_bytes"], plan["device_batch_size"], plan["grad_accum_steps"]) == (40 * GIB, 32, 4)


def test_no_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", list)
    with pytest.raises(UserError, match="gpus = 1: no usable CUDA device"):
        make_plan(on_gpu())


def test_nothing_fits_is_an_error_that_says_what_to_shrink(device):
    device.fixed = 100 * GIB
    with pytest.raises(UserError, match=r"train\.base.*out of memory.*Lower train\.base\.sequence_length"):
        make_plan(on_gpu())
    device.fixed = 75 * GIB  # it runs, without the margin
    with pytest.raises(UserError, match=r"not even one row .* fits in 85% of 80\.0 GiB \(too large\)"):
        make_plan(on_gpu())


def test_a_gpu_that_another_process_filled_is_measured_again(device, tmp_path, capfd):
    device.fixed = 100 * GIB
    with pytest.raises(UserError, match="not even one row"):
        make_plan(on_gpu(tmp_path))
    device.fixed = 2 * GIB
    plan = make_plan(on_gpu(tmp_path))
    assert (plan["device_batch_size"], plan["source"]) == (64, "measured")
    assert "measuring again" in capfd.readouterr().err
    mark_as_too_large(plan["cache"], plan["key"], 1)
    with pytest.raises(UserError, match="training ran out of memory with it"):
        make_plan(on_gpu(tmp_path))


@pytest.mark.parametrize(
    ("note", "says"),
    [
        (
            prober.OUT_OF_HOST_MEMORY,
            r"tried in the job's memory, .* GiB\. Give it more \(mem_mb in the profile\), or lower",
        ),
        (f"{prober.TOO_SLOW} 300 s", r"within batch_size\.probe_timeout_seconds = 300\. Raise it, or lower"),
    ],
)
def test_what_is_not_the_sizes_fault_is_not_kept_and_has_its_own_remedy(device, tmp_path, note, says):
    device.refuses = note
    with pytest.raises(UserError, match=says):
        make_plan(on_gpu(tmp_path))
    device.refuses = None
    assert make_plan(on_gpu(tmp_path))["device_batch_size"] == 64


def test_override_is_honoured_and_recorded():
    plan = make_plan(settings(device_batch_size=4))
    assert (plan["device_batch_size"], plan["grad_accum_steps"], plan["source"]) == (4, 3, "override")
    with pytest.raises(UserError, match=r"device_batch_size = 5.*1, 2, 3, 4, 6, 12"):
        make_plan(settings(device_batch_size=5))


def test_ranks_on_the_cpus_of_several_nodes_share_a_step():
    plan = make_plan(settings(ranks=2, device_batch_size=3))
    assert plan["grad_accum_steps"] == 2  # of twelve rows, three at a time on each of two nodes
    stage = config.Base(gpus=0, nodes=2)
    assert stage.ranks == 2
    assert config.Base(gpus=8, nodes=2).ranks == 8


def test_tokens_that_no_row_divides_are_refused():
    with pytest.raises(UserError, match=r"train\.base\.tokens_per_step = 100.*Nearest: 96 or 112"):
        make_plan(settings(tokens_per_step=100))


def test_stages_of_one_shape_share_their_probes(device, tmp_path):
    first = make_plan(on_gpu(tmp_path))
    measured_first = sorted(device.tried)
    again = make_plan(on_gpu(tmp_path))
    assert again["source"] == "cache"
    assert again["device_batch_size"] == first["device_batch_size"]
    fewer = make_plan(on_gpu(tmp_path, rows=32, stage="sft"))
    assert (fewer["stage"], fewer["device_batch_size"], fewer["source"]) == ("sft", 32, "cache")
    assert sorted(device.tried) == measured_first
    assert make_plan(on_gpu(tmp_path), use_cache=False)["source"] == "measured"
    assert len(device.tried) == 2 * len(measured_first)


def test_two_sizes_about_as_fast_are_timed_twice_once(device, tmp_path):
    """The mean of both timings counts, and is kept."""
    per_row = {32: iter([1.001, 1.02]), 64: iter([1.0, 1.0])}
    device.micro_step_seconds = lambda rows: 0.01 * rows * (next(per_row[rows]) if rows in per_row else 1.1)
    first = make_plan(on_gpu(tmp_path))
    assert (device.tried.count(32), device.tried.count(64)) == (2, 2)
    assert first["device_batch_size"] == 64, "32 rows are 0.1% behind, then 2%: 1% on average"
    timings = {one["device_batch_size"]: one["timings"] for one in first["probes"]}
    assert timings[32] == timings[64] == 2
    tried = list(device.tried)
    assert make_plan(on_gpu(tmp_path))["device_batch_size"] == 64
    assert device.tried == tried


def test_a_failed_size_is_not_chosen_again(device, tmp_path):
    plan = make_plan(on_gpu(tmp_path))
    mark_as_too_large(plan["cache"], plan["key"], 64)
    assert make_plan(on_gpu(tmp_path))["device_batch_size"] == 32
    assert make_plan(on_gpu(tmp_path), use_cache=False)["device_batch_size"] == 64
    assert make_plan(on_gpu(tmp_path))["device_batch_size"] == 32, "measuring anew does not make it right"


def test_a_timeout_is_not_kept(device, tmp_path, monkeypatch):
    kept = Measured.load(str(tmp_path), "k", True, print)
    kept.did_not_run(8, "ended after 300 s", 300.0)
    kept.did_not_run(16, measured.OUT_OF_MEMORY, 3.0)
    assert Measured.load(str(tmp_path), "k", True, print).sizes == [16]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"key": "other", "probes": []}',
        '{"key": "KEY", "probes": 3}',
        '{"key": "KEY", "probes": [{"device_batch_size": "8", "ok": true}]}',
        '{"key": "KEY", "probes": [{"device_batch_size": 8, "ok": true, "seconds": 1, "peak_bytes": null}]}',
    ],
)
def test_a_corrupt_or_foreign_cache_is_measured_anew(tmp_path, device, content, capfd):
    make_plan(on_gpu(tmp_path))
    (path,) = tmp_path.glob("*.json")
    path.write_text(content.replace("KEY", path.stem))
    assert make_plan(on_gpu(tmp_path))["source"] == "measured"
    assert "measuring again" in capfd.readouterr().err
    assert make_plan(on_gpu(tmp_path))["source"] == "cache"


def test_a_cache_that_cannot_be_written_is_no_failure(device, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert make_plan(on_gpu(tmp_path / "file" / "folder"))["device_batch_size"] == 64
    assert "not kept" in capfd.readouterr().err


def test_the_key_holds_all_that_matters(monkeypatch, tmp_path):
    base = on_gpu()
    keys = {cache_key(base, GPU)}
    other_model = config.Model(depth=3, width=32, head_dim=8).resolved()
    for changed in (
        {"model": other_model},
        {"vocab_size": 68},
        {"sequence_length": 32},
        {"dtype": "bfloat16"},
        {"compile": "on"},
        {"gpus": 2},
    ):
        keys.add(cache_key(base.model_copy(update=changed), GPU))
    for changed in ({"name": "Other"}, {"memory_bytes": 40 * GIB}, {"driver": "590.1"}):
        keys.add(cache_key(base, hardware.Gpu(**vars(GPU) | changed)))
    keys.add(cache_key(base, None))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    keys.add(cache_key(base, GPU))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    # The code of the model and of training, and torch itself.
    read_bytes, read_text = Path.read_bytes, Path.read_text
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.name == "gpt.py"))
    keys.add(cache_key(base, GPU))
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.name == "optimizer.py"))
    keys.add(cache_key(base, GPU))
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "read_text", lambda path, *a: read_text(path, *a) + "#" * (path.name == "version.py"))
    keys.add(cache_key(base, GPU))
    monkeypatch.setattr(Path, "read_text", read_text)
    assert len(keys) == 1 + 6 + 3 + 1 + 1 + 3
    for same in ({"stage": "sft"}, {"tokens_per_step": 8 * LENGTH}, {"batch_size": config.BatchSize(margin=0.3)}):
        assert cache_key(base.model_copy(update=same), GPU) in keys


def test_two_jobs_may_write_the_cache_at_once(tmp_path):
    """A reader sees whole probes, never a mixture; both jobs end well."""
    job = f"""
import sys
from nanochat.train.measured import Measured
kept = Measured.load({str(tmp_path)!r}, "k", True, print)
for i in range(60):
    kept.ran(int(sys.argv[1]), {{"peak_bytes": 1, "beside_bytes": 0, "dtype": "float32", "micro_step_seconds": 1.0,
        "optimizer_seconds": 1.0, "filler": "x" * 99999}}, 1.0)
"""
    jobs = [subprocess.Popen([sys.executable, "-c", job, size]) for size in ("3", "4")]
    path, complaints = tmp_path / "k.json", []
    while not path.exists():
        assert jobs[0].poll() in (None, 0)
    while any(process.poll() is None for process in jobs):
        assert set(Measured.load(str(tmp_path), "k", True, complaints.append).sizes) <= {3, 4}
    assert [process.returncode for process in jobs] == [0, 0]
    assert not complaints
    assert [p.name for p in tmp_path.iterdir()] == ["k.json"]


def test_decoding_rows_are_those_that_fit(device):
    plan = make_plan(on_gpu())
    decode, sizes = plan["decode"], settings().model
    model = GPT(GPTConfig.from_settings(MODEL, VOCAB, LENGTH))
    # But for the gates of the additions.
    assert decode["weight_bytes"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.01)
    assert decode["memory_bytes"] == int(0.85 * 80 * GIB) - decode["weight_bytes"] - GIB // 2
    taken = [hardware.decode_bytes(sizes, VOCAB, decode["rows"] + more, LENGTH, 2) for more in (0, 1)]
    assert taken[0] <= decode["memory_bytes"] < taken[1]


@pytest.mark.slow
def test_a_real_measurement_gives_a_plan_and_a_hit_takes_no_time(tmp_path):
    """Through the command, as the workflow runs it."""
    write_json(tmp_path / "s.json", settings(tmp_path / "cache").model_dump(mode="json"))
    command = [sys.executable, "-m", "nanochat", "batch_size", "--config", str(tmp_path / "s.json")]
    subprocess.run([*command, "--out", str(tmp_path / "one.json")], check=True)
    plan = read_json(tmp_path / "one.json")
    assert plan["source"] == "measured"
    assert plan["device_batch_size"] * plan["grad_accum_steps"] == 12
    assert 0 < plan["peak_bytes"] < plan["capacity_bytes"]
    assert all(p["ok"] and p["tokens_per_second"] > 0 for p in plan["probes"])
    started = time.monotonic()
    hit = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:], "--out", str(tmp_path / "two.json")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - started < 2
    assert " torch\n" not in hit.stderr, "torch takes seconds to import"
    again = read_json(tmp_path / "two.json")
    assert (again["source"], again["device_batch_size"]) == ("cache", plan["device_batch_size"])


@pytest.mark.slow
def test_what_was_planned_can_be_measured_again():
    plan = {"device_batch_size": 4, "settings": settings().model_dump(mode="json")}
    with Prober(settings(), 60) as probe:
        assert measure_again(plan, None) == pytest.approx(probe(4)["peak_bytes"], rel=0.2)
    assert measure_again({**plan, "settings": None}, None) is None


@pytest.mark.slow
def test_a_probe_ends_at_its_deadline_and_at_the_memory_it_may_use():
    with Prober(settings(), timeout_seconds=0.3) as probe, pytest.raises(DidNotRun, match=r"ended after 0 s"):
        probe(1)
    with Prober(settings(), 60, host_bytes=10 * 2**20) as probe, pytest.raises(DidNotRun, match="memory"):
        probe(1)


@pytest.mark.slow
def test_a_cpu_that_runs_out_of_memory_is_an_answer():
    """The kernel must not have to end the job: the probe may hold 1 GiB, and this takes more."""
    wide = settings(model=config.Model(depth=4, width=512, head_dim=64).resolved(), sequence_length=2048)
    with Prober(wide, 60, host_bytes=GIB) as probe, pytest.raises(DidNotRun, match="memory"):
        probe(64)


@pytest.mark.slow
def test_a_process_that_waits_is_used_and_none_is_left(tmp_path):
    with Prober(settings(), 60, ahead=True) as probe:
        first = probe(2)
        waiting = probe._waiting._process.pid
        assert probe(4)["micro_step_seconds"] > 0
        last = probe._waiting._process.pid
    assert first["peak_bytes"] > 0
    assert waiting != last
    for pid in (waiting, last):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_a_probe_that_fails_says_why():
    broken = settings().model_copy(update={"model": MODEL.resolved().model_copy(update={"heads": 3})})
    with Prober(broken, 60) as probe, pytest.raises(UserError, match=r"probe of 1 rows failed .* heads"):
        probe(1)


def test_importing_the_stage_imports_no_torch():
    code = "import sys, json, nanochat.train.batch_size; print(json.dumps('torch' in sys.modules))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout) is False
    assert importlib.util.find_spec("torch")


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.visible_gpus(), reason="needs a CUDA device")
def test_a_plan_on_a_real_gpu(tmp_path):
    """The line, the driver's own figure of the memory, and a peak that the device really reached."""
    small = {"sequence_length": 1024, "tokens_per_step": 64 * 1024, "vocab_size": 4096}
    plan = make_plan(settings(tmp_path, gpus=1, batch_size={"max_device_batch_size": 64}, **small))
    assert plan["device_batch_size"] * plan["grad_accum_steps"] == 64
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    total = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert plan["capacity_bytes"] == pytest.approx(total, rel=0.02)
    assert GIB // 8 < plan["peak_bytes"] < 0.85 * plan["capacity_bytes"]
    assert make_plan(settings(tmp_path, gpus=1, batch_size={"max_device_batch_size": 64}, **small))["source"] == "cache"

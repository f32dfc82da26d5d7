"""The page: nothing on it that is not in report.json, and no run that it cannot be written for."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from report_run import write_run

from nanochat.cli import main
from nanochat.config import Cost
from nanochat.errors import UserError
from nanochat.report import figures
from nanochat.report.build import build, headline
from nanochat.report.collect import collect
from nanochat.report.numbers import DASH, amount, duration, short, show, size, tidy
from nanochat.report.read import Run
from nanochat.report.render import block, render
from nanochat.report.steps import smoothed

FIGURES = ("loss", "timeline", "cost", "kv_cache", "batch_size", "batch_size_curve")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its report, and the time at which it was written."""
    results = tmp_path_factory.mktemp("run") / "results"
    now = write_run(results).clock
    build(results, Cost(), now)
    return results, now


def page(results) -> str:
    return (results / "report.md").read_text()


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_is_made_of_report_json_alone(run):
    results, _ = run
    content = json.loads((results / "report.json").read_text())
    assert render(content) == page(results)
    shown = {show(entry) for entry in content["values"]}
    numbers = [cell for row in cells(page(results)) for cell in row if re.fullmatch(r"[\d,.]+( ?[A-Za-z%]+)?", cell)]
    assert len(numbers) > 300
    assert not [cell for cell in numbers if cell not in shown]


def test_every_number_has_unit_and_source(run):
    content = json.loads((run[0] / "report.json").read_text())
    for entry in content["values"]:
        assert {"section", "row", "key", "value", "unit", "device", "method"} <= set(entry)
        if entry["value"] is None:
            assert entry["missing"]
        elif isinstance(entry["value"], int | float):
            assert entry["method"], entry


def test_no_nan_and_no_endless_digits(run):
    text = page(run[0])
    assert not re.search(r"\b(nan|inf|None|null|undefined)\b", text, re.IGNORECASE)
    assert not re.search(r"\d\.\d{5,}", text)


def test_numbers_stand_at_the_right(run):
    rows = cells(page(run[0]))
    for head, rule in itertools.pairwise(rows):
        for title, mark in zip(head, rule, strict=False):
            if set(mark) <= {"-", ":"} and title in (
                "Tokens/s",
                "GPU-hours",
                "CPU-hours",
                "Ran",
                "Queued",
                "Share",
                "base",
            ):
                assert mark.endswith(":"), title


def test_what_a_supervisor_asks_for_is_there(run):
    text = page(run[0])
    for words in (
        "GPU-hours",
        "CPU-hours",
        "USD",
        "PREEMPTED",
        "NODE_FAIL",
        "CUDA out of memory",
        "was running when this was written: counted until then",
        "Chance",
        "Goodput of training",
        "Projected tokens/s",
        "Real tokens/s",
        "NVIDIA A100-SXM4-80GB",
        "3f1c2ab",
    ):
        assert words in text
    for figure in FIGURES:
        assert f"](figures/{figure}.png)" in text


def test_a_score_has_its_interval_and_a_loss_has_none(run):
    rows = {row[0]: row for row in cells(page(run[0]))}
    assert "34.0% (30.1 to 37.9%)" in rows["Multiple choice"]
    assert not [cell for cell in rows["Bits per byte (held-out)"] if "(" in cell and "held-out" not in cell]
    assert "34.0% (chance" in page(run[0]) or "39.0% (chance" in page(run[0])  # the headline has the score alone


def test_a_stage_without_a_job_and_a_cancelled_one_are_named(tmp_path):
    results = tmp_path / "results"
    write_run(results)
    ledger = results / "jobs/ledger.jsonl"
    kept = [json.loads(line) for line in ledger.read_text().splitlines() if '"rule": "base"' not in line]
    now = max(line["ended"] or 0 for line in kept) + 5
    for line in kept:
        line["state"] = "CANCELLED" if line["rule"] == "corpus" else line["state"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in kept))
    build(results, Cost(), now)
    text = page(results)
    assert "`base` was trained by no job of the ledger (by hand?): its hours are in no sum." in text
    assert re.search(r"attempts(, \d+ of them failed)?, 1 cancelled", text)


def test_large_counts_are_words():
    assert [short(count) for count in (999_600_000, 999_400_000, 1.5e9, 999)] == [
        "1 billion",
        "999 million",
        "1.5 billion",
        "999",
    ]


def test_json_that_no_reader_can_hold_is_left_out(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/metrics.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid/metrics.json").write_text('{"tokens": ' + "9" * 400 + "}")
    build(tmp_path, Cost(), 1.0)


def test_a_sandbox_with_holes_is_said(run):
    notes = [line for line in page(run[0]).splitlines() if "without a namespace" in line]
    assert notes == [
        "- `evaluate/sft.json`: humaneval ran programs of the model without a namespace for files: not allowed there."
    ]


def test_a_smoothed_curve_keeps_a_line_and_does_not_end_in_a_single_value():
    line = [3 - 0.01 * i for i in range(200)]
    assert smoothed(line, 5) == pytest.approx(line)
    with_a_spike = [*line[:-1], line[-1] + 1]
    assert smoothed(with_a_spike, 5)[-1] - line[-1] < 0.35
    assert smoothed(line[:7], 5) == pytest.approx(line[:7])


def test_decoding_says_what_was_not_measured_and_what_no_row_holds(run):
    text = page(run[0])
    assert "Not measured: vllm is not installed." in text
    assert not [row for row in cells(text) if row[0] == "vLLM"]
    assert "transformers, growing cache with 93 rows: not run: no time left" in text
    assert ["transformers, growing cache", "93", DASH, DASH] in [row[:4] for row in cells(text)]
    assert "at 91.2% of the speed of equal ones" in text
    assert "prompt of 2,048 tokens takes 1.83 ms: 3.51x" in text
    assert "20 layers x 1,280 decodes one row at 2,534 tokens/s, 72.7% of the bandwidth floor" in text
    assert "all numbers of rows (32) takes 4.9 s" in text


def test_labels_of_curves_that_end_together_make_room():
    axis = Figure().subplots()
    figures._label_ends(axis, [(93, 6190.0), (93, 5570.0), (32, 3340.0), (93, 8240.0), (93, 2e5)], points_per_unit=33)
    heights = {note.get_text(): math.log(note.xy[1]) * 33 + note.xyann[1] for note in axis.texts}
    together = sorted(heights[text] for text in ("5,570", "6,190", "8,240", "200,000"))
    assert all(above - below > 8.5 for below, above in itertools.pairwise(together))
    moved = {note.get_text() for note in axis.texts if note.xyann[1] > 0}
    assert {"5,570", "3,340", "200,000"}.isdisjoint(moved)


def test_a_curve_is_drawn_and_not_listed(run):
    text = (run[0] / "report.md").read_text()
    part = text[text.index("### Batch size") : text.index("### Decoding")]
    assert "curve |" not in part
    assert part.count("| pretraining: found") == 2
    assert "64 rows are the fastest; the plan's 32 reach 99.8% of that" in part


def test_figures_are_pictures(run):
    for figure in FIGURES:
        height, width, _ = imread(run[0] / f"figures/{figure}.png").shape
        assert width > 600
        assert height > 150


def test_headline_is_short_and_from_report_json(run, capsys):
    assert main(["report", "--results", str(run[0]), "--headline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 8
    assert lines == headline(run[0]).splitlines()
    assert "4 x NVIDIA A100-SXM4-80GB" in lines[1]


def test_projections_are_called_so(run):
    content = json.loads((run[0] / "report.json").read_text())
    predicted = [entry for entry in content["values"] if entry["key"].startswith("predicted")]
    assert predicted
    assert all("projection" in entry["method"] for entry in predicted)


def test_a_run_without_gpus_accounts_for_cpu_hours(tmp_path):
    now = write_run(tmp_path / "results", gpus=0).clock
    build(tmp_path / "results", Cost(cpu_hour_price=0.05), now)
    text = page(tmp_path / "results")
    assert "no job held a GPU" in text
    assert "MFU: no peak is known for AMD EPYC 7742" in text
    assert "Cost: 0 GPU-hours" in headline(tmp_path / "results")


def test_an_empty_folder_gives_a_page_and_figures(tmp_path):
    build(tmp_path, Cost(), now=1e9)
    text = page(tmp_path)
    assert "What is missing" in text
    assert "No ledger of jobs" in text
    assert 1 <= len(headline(tmp_path).splitlines()) <= 8
    assert all((tmp_path / f"figures/{figure}.png").exists() for figure in FIGURES)


def test_no_report_and_no_folder_are_named(tmp_path, capsys):
    with pytest.raises(UserError, match=r"report\.json: no such file"):
        headline(tmp_path)
    assert main(["report", "--results", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


FILES = [
    "base/metrics.json",
    "base/log.jsonl",
    "sft/metrics.json",
    "sft/config.json",
    "sft/model.safetensors",
    "batch_size/mid.json",
    "evaluate/mid.json",
    "benchmark/training.json",
    "benchmark/kv_cache.json",
    "benchmark/first_token.json",
    "tokenizer/metrics.json",
    "corpus/manifest.json",
    "tokens/metrics.json",
    "conversations/sft/metrics.json",
    "jobs/ledger.jsonl",
]
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def spoiled(run, tmp_path_factory):
    """A copy of the run that a test may spoil again and again; `restore` makes it whole."""
    copy = tmp_path_factory.mktemp("spoiled") / "results"

    def restore():
        shutil.rmtree(copy, ignore_errors=True)
        return shutil.copytree(run[0], copy, ignore=shutil.ignore_patterns("figures"))

    return restore


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_may_be_missing_damaged_or_foreign(spoiled, run, data):
    results = spoiled()
    for name in data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=4, unique=True)):
        path = results / name
        how = data.draw(st.sampled_from(["gone", "cut", "foreign", "field"]))
        content = path.read_bytes()
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        elif how == "foreign" or not name.endswith((".json", ".jsonl")):
            path.write_text(json.dumps(data.draw(junk)))
        else:
            lines = content.splitlines() if name.endswith(".jsonl") else [content]
            one = json.loads(lines[-1])
            one[data.draw(st.sampled_from(sorted(one)))] = data.draw(junk)
            path.write_text("\n".join(map(bytes.decode, lines[:-1])) + "\n" + json.dumps(one) + "\n")
    content = collect(Run(results), Cost(), run[1]).report()
    text = render(json.loads(json.dumps(content, allow_nan=False)))
    assert text.startswith("# Report of a training run\n")


@pytest.mark.parametrize(
    "name", ["benchmark/kv_cache.json", "evaluate/mid.json", "base/metrics.json", "jobs/ledger.jsonl"]
)
def test_what_is_missing_is_named(spoiled, run, name):
    results = spoiled()
    (results / name).unlink()
    text = render(collect(Run(results), Cost(), run[1]).report())
    missing = text.split("## What is missing")[1].split("##")[0]
    assert f"`{name}`" in missing


def test_a_report_needs_no_torch():
    code = (
        "import sys, nanochat.report.build, nanochat.report.collect, nanochat.report.figures, nanochat.report.render;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(st.text())
def test_what_a_model_wrote_cannot_break_out_of_its_block(written):
    for line in block("model", written).split("\n"):
        assert line.startswith("    ")
        assert line.isprintable()


@given(st.floats() | st.integers(-(10**15), 10**15))
def test_a_number_is_short_or_absent(value):
    tidied = tidy(value)
    if tidied is None:
        return
    for unit in ("number", "count", "seconds", "bytes", "fraction", "hours", "tokens/s", "USD"):
        if abs(tidied) < 1e12:
            text = show({"value": tidied, "unit": unit})
            assert not re.search(r"\.\d{8,}", text)
            assert "nan" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(59.96), "1 min 00 s"),
        (duration(0.44), "0.4 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(200_000), "2 d 08 h"),
        (size(999), "999 bytes"),
        (size(61_234_567_890), "61.2 GB"),
        (size(999_600), "1 MB"),
        (amount(1234.5678), "1,235"),
        (amount(0.33333333), "0.3333"),
        (show({"value": None, "unit": "count"}), DASH),
        (show({"value": 12.5, "unit": "USD"}), "12.50 USD"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected


@pytest.mark.parametrize(("written", "marked"), [([1, 2, 3, 2, 3], [2]), ([1, 2, 3, 1, 2], []), ([1, 2, 3], [])])
def test_a_stage_begun_anew_did_not_go_on_from_a_checkpoint(written, marked):
    log = [SimpleNamespace(step=step, ended=None, survives=True) for step in written]
    assert figures._restarts(SimpleNamespace(steps={"sft": log}, attempts=[]), "sft") == marked

"""The whole DAG through Snakemake and submitit, as a user runs it: cut off in the middle, finished, rerun in part.

The tests share one working copy and build on each other in the order they stand in.
"""

import json
import random
import re
import time

import pytest

from nanochat.files import read_json, read_json_lines

pytestmark = pytest.mark.slow


def jobs_of(output: str) -> set[str]:
    """Rules in the `Job stats` table of a run or a dry run; `all` does nothing itself."""
    table = output.split("Job stats:")[1].split("total")[0]
    return {line.split()[0] for line in table.splitlines() if re.fullmatch(r"\w+ +\d+", line.strip())} - {"all"}


def test_a_run_that_is_killed_in_training_goes_on_from_its_checkpoint(checkout):
    results = checkout.folder / "results"
    run = checkout.start(*checkout.make_run())
    checkout.wait_for(lambda: list((results / "base/checkpoints").glob("*")), run)
    time.sleep(1.5)
    assert checkout.kill(run.pid) > 3
    steps_before = [line["step"] for line in read_json_lines(results / "base/log.jsonl")]
    assert steps_before
    assert not (results / "base/model.safetensors").exists()

    # A job that is queued again reads its settings anew: what is tried out meanwhile must not reach it.
    checkout.configure(checkout.settings.replace("depth: 2", "depth: 3"))
    output = checkout.run(*checkout.snakemake("-n"))
    assert "goes on with other settings of" in output
    assert read_json(results / "config/base.json")["model"]["depth"] == 2
    checkout.configure(checkout.settings)

    output = checkout.run(*checkout.make_run())

    metrics = read_json(results / "base/metrics.json")
    assert metrics["steps"] == 300
    assert metrics["restarts"] == 1
    steps = [line["step"] for line in read_json_lines(results / "base/log.jsonl")]
    assert set(steps) == set(range(min(steps), min(steps) + 300))
    assert 0 < len(steps) - 300 < len(steps_before), "it resumed from a checkpoint, not from the start"
    assert "was killed; its lock is removed" in output
    assert "results/report.md" in output


def test_every_file_of_the_contract_is_there(checkout):
    results = checkout.folder / "results"
    names = ["corpus/manifest.json", "tokenizer/tokenizer.json", "tokens/metrics.json", "report.md", "report.json"]
    names += [f"batch_size/{stage}.json" for stage in ("base", "mid", "sft")]
    names += [f"evaluate/{stage}.json" for stage in ("base", "mid", "sft")]
    names += [
        f"{stage}/{file}"
        for stage in ("base", "mid", "sft")
        for file in ("model.safetensors", "config.json", "metrics.json", "log.jsonl")
    ]
    names += [f"benchmark/{name}.json" for name in ("training", "kv_cache", "first_token")]
    missing = [name for name in [*names, "jobs/ledger.jsonl"] if not (results / name).is_file()]
    assert not missing
    assert list((results / "figures").glob("*.png"))


def test_metrics_hold_what_the_contract_says(checkout):
    keys = "steps tokens seconds tokens_per_second mfu peak_memory_bytes gpu_utilization device gpus loss_first loss_last val_bpb"
    keys += " padding_fraction restarts commit torch"
    for stage in ("base", "mid", "sft"):
        metrics = read_json(checkout.folder / f"results/{stage}/metrics.json")
        assert not set(keys.split()) - set(metrics), stage
        assert metrics["loss_last"] < metrics["loss_first"], stage
    plan = read_json(checkout.folder / "results/batch_size/base.json")
    expected = "device_batch_size grad_accum_steps tokens_per_step max_device_batch_size capacity_bytes peak_bytes margin probes key seconds source"
    assert not set(expected.split()) - set(plan)
    assert plan["device_batch_size"] * plan["grad_accum_steps"] * 64 == plan["tokens_per_step"]


def test_the_ledger_knows_the_attempt_that_was_killed(checkout):
    newest = {}
    for line in read_json_lines(checkout.folder / "results/jobs/ledger.jsonl"):
        newest[line["job_id"], line["attempt"], line["restart"]] = line
    base = [line for line in newest.values() if line["rule"] == "base"]
    assert len(base) == 2
    assert sum(line["state"] == "COMPLETED" for line in base) == 1
    assert all(line["ended"] >= line["started"] for line in base if line["ended"])


def test_a_second_run_has_nothing_to_do_within_ten_seconds(checkout):
    started = time.monotonic()
    output = checkout.run(*checkout.make_run())
    assert time.monotonic() - started < 10
    assert "Nothing to be done" in output


def test_a_comment_or_another_formatting_changes_nothing(checkout):
    commented = "# a comment\n" + checkout.settings.replace("depth: 2, width: 64", "width: 64,   depth: 2")
    checkout.configure(commented)
    rule = checkout.folder / "workflow/rules/train.smk"
    rule.write_text(rule.read_text() + "\n# another comment\n")
    assert "Nothing to be done" in checkout.run(*checkout.snakemake("-n"))


def test_what_decides_only_how_a_stage_runs_leaves_what_is_finished(checkout):
    settings = checkout.settings.replace("train:\n", "train:\n  trackers: [tensorboard]\n")
    settings = settings.replace("checkpoint_every_seconds: 1.0", "checkpoint_every_seconds: 9.0")
    checkout.configure(settings)
    assert "Nothing to be done" in checkout.run(*checkout.snakemake("-n"))
    fewer = settings.replace("{gpus: 0, steps: 2,", "{names: [training], gpus: 0, steps: 2,")
    checkout.configure(fewer)
    assert jobs_of(checkout.run(*checkout.snakemake("-n"))) == {"report"}
    checkout.configure(settings.replace('cache: ""', 'cache: "", margin: 0.2'))
    assert {"batch_size_plan", "base", "sft", "report"} <= jobs_of(checkout.run(*checkout.snakemake("-n")))
    checkout.configure(checkout.settings)
    assert "Nothing to be done" in checkout.run(*checkout.snakemake("-n"))


def test_a_key_of_sft_reruns_sft_and_what_depends_on_it(checkout):
    untouched = {
        path: path.stat().st_mtime_ns
        for stage in ("corpus", "tokens", "base", "mid")
        for path in (checkout.folder / "results" / stage).iterdir()
    }
    checkout.configure(checkout.settings.replace("sft: {gpus: 0,", "sft: {gpus: 0, learning_rate_scale: 0.2,"))
    assert jobs_of(checkout.run(*checkout.snakemake("-n"))) == {"sft", "evaluate_stage", "report"}
    checkout.run(*checkout.snakemake("sft"))
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    log = read_json_lines(checkout.folder / "results/sft/log.jsonl")
    assert log
    assert jobs_of(checkout.run(*checkout.snakemake("-n"))) == {"evaluate_stage", "report"}


def test_forcerun_runs_one_stage_again_and_what_depends_on_it(checkout):
    before = read_json(checkout.folder / "results/sft/metrics.json")
    plan = checkout.run(*checkout.snakemake("-n", "-p", "--forcerun", "sft"))
    assert "nanochat sft --config results/config/sft.json" in plan
    assert {"sft", "evaluate_stage", "report"} <= jobs_of(plan)
    checkout.run(*checkout.snakemake("sft", "--forcerun", "sft"))
    after = read_json(checkout.folder / "results/sft/metrics.json")
    assert after["steps"] == before["steps"]
    assert after["loss_last"] == pytest.approx(before["loss_last"], rel=1e-3)
    assert after["seconds"] != before["seconds"], "it trained again"


def test_snakemake_writes_its_own_report(checkout):
    checkout.run(*checkout.snakemake())
    checkout.run(*checkout.snakemake("--report", "results/report.html"))
    assert (checkout.folder / "results/report.html").stat().st_size > 100_000


def test_stages_run_by_hand_with_the_command_of_the_rule(checkout):
    """`-n -p` prints the command; typed in a shell it says that the stage is complete and changes nothing."""
    plan = checkout.run(*checkout.snakemake("base", "-n", "-p", "--forcerun", "base"))
    command = next(line for line in plan.splitlines() if "nanochat base" in line)
    command = command.removeprefix("Shell command: ").split(" > ")[0].strip()
    before = (checkout.folder / "results/base/metrics.json").read_text()
    checkout.run("bash", "-c", command)
    assert (checkout.folder / "results/base/metrics.json").read_text() == before


def test_a_run_keeps_the_settings_that_it_began_with(fresh_checkout):
    """config.yaml is edited for the next run, to something that cannot even be read, while the first job runs."""
    ledger = fresh_checkout.folder / "results/jobs/ledger.jsonl"
    process = fresh_checkout.start(*fresh_checkout.snakemake("tokens"))
    fresh_checkout.wait_for(ledger.exists, process)
    (fresh_checkout.folder / "config.yaml").write_text("results: elsewhere\nmodel: {depth: [\n")
    fresh_checkout.configure("tokenizer: {vocab_sise: 3}\n")
    code, output = fresh_checkout.finish(process)
    assert code == 0, output[-6000:]
    assert read_json(fresh_checkout.folder / "results/tokens/metrics.json")["vocab_size"] == 512
    assert not (fresh_checkout.folder / "elsewhere").exists()


def test_an_edited_text_makes_the_corpus_anew(fresh_checkout):
    own = fresh_checkout.folder / "own"
    own.mkdir()
    words = ["".join(random.Random(i).choices("abcdefghijklmnop", k=3 + i % 7)) for i in range(900)]
    for name in "ab":
        texts = (" ".join(random.Random(f"{name}{i}").choices(words, k=40)) for i in range(1000))
        (own / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fresh_checkout.configure(
        fresh_checkout.settings.replace("source: bundled, max_bytes: 1500000,", "source: directory, paths: [own/],")
    )
    corpus = fresh_checkout.snakemake("corpus")
    fresh_checkout.run(*corpus)
    assert "Nothing to be done" in fresh_checkout.run(*corpus, "-n")
    with open(own / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert jobs_of(fresh_checkout.run(*corpus, "-n")) == {"corpus"}
    fresh_checkout.run(*corpus)
    (own / "b.jsonl").unlink()
    assert jobs_of(fresh_checkout.run(*corpus, "-n")) == {"corpus"}


def test_another_results_folder_holds_the_jobs_too(checkout):
    checkout.run(*checkout.snakemake("corpus", "--config", "results=elsewhere"))
    assert (checkout.folder / "elsewhere/corpus/manifest.json").is_file()
    assert (checkout.folder / "elsewhere/jobs/ledger.jsonl").is_file()


def test_the_report_holds_only_numbers_of_its_json(checkout):
    page = (checkout.folder / "results/report.md").read_text()
    numbers = json.dumps(read_json(checkout.folder / "results/report.json"))
    assert "nan" not in page.lower().split()
    assert numbers

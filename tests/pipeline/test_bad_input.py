"""Bad input ends before any job is queued: one or two lines, no traceback, exit code not 0, nothing written is lost."""

import pytest

CASES = {
    "misspelt key": ("model: {depht: 2}", "model.depht: no such setting. Did you mean model.depth?"),
    "wrong type": ("model: {depth: two}", "model.depth = two: not a whole number."),
    "negative size": ("train: {base: {sequence_length: -1}}", "train.base.sequence_length = -1"),
    "vocabulary too large": (
        "corpus: {source: bundled, max_bytes: 20000}\ntokenizer: {vocab_size: 60000}",
        "tokenizer.vocab_size = 60000",
    ),
    "width": ("model: {width: 100, heads: 7}", "model.heads = 7: does not divide the width 100."),
    "tokens per step": (
        "train: {base: {tokens_per_step: 1000, gpus: 0, sequence_length: 64}}",
        "no batch size divides it",
    ),
    "missing corpus": ("corpus: {source: directory, paths: [nowhere]}", "nowhere"),
    "results not writable": ("results: config.yaml/results", "results"),
    "empty corpus": ("corpus: {source: directory, paths: [empty]}", "corpus.paths = 'empty'"),
    "corpus too small": (
        "corpus: {source: directory, paths: [tiny.jsonl], validation_fraction: 0.5}",
        "needs train.base.sequence_length + 1 = 2,049",
    ),
    "not UTF-8": ("corpus: {source: directory, paths: [latin.txt]}", "latin.txt"),
    "truncated parquet": ("corpus: {source: directory, paths: [cut.parquet]}", "cut.parquet"),
    "no text column": ("corpus: {source: directory, paths: [tiny.jsonl], text_column: body}", "tiny.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_before_any_job(fresh_checkout, name):
    settings, expected = CASES[name]
    checkout = fresh_checkout
    (checkout.folder / "tiny.jsonl").write_text("".join(f'{{"text": "Line {n} is no corpus."}}\n' for n in range(20)))
    (checkout.folder / "empty").mkdir()
    (checkout.folder / "latin.txt").write_bytes("Une chaîne de caractères.".encode("latin-1"))
    bundled = checkout.folder / "nanochat/data/bundled/sotu.parquet"
    (checkout.folder / "cut.parquet").write_bytes(bundled.read_bytes()[:100_000])
    kept = checkout.folder / "results/base/metrics.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    checkout.configure(settings)
    code, output = checkout.finish(checkout.start(*checkout.snakemake()))
    assert code != 0
    assert expected in output
    assert "Traceback" not in output
    message = [line for line in output.splitlines() if line and not line.startswith(("Using profile", "Config file"))]
    assert 1 <= len(message) <= 2, message
    assert kept.read_text() == "{}"
    assert not (checkout.folder / "results/jobs").exists()


@pytest.mark.slow
def test_a_slip_of_yaml_is_named_with_its_line(fresh_checkout):
    path = fresh_checkout.folder / "config.yaml"
    path.write_text("seed: 1\nmodel:\n  depth:4\n  width: 64\n")
    code, output = fresh_checkout.finish(fresh_checkout.start(*fresh_checkout.snakemake()))
    assert code == 2
    assert "config.yaml: not valid YAML: " in output
    assert "line 4" in output
    assert "Traceback" not in output

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
    "corpus too small": ("corpus: {source: directory, paths: [tiny.txt]}", "tiny.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_before_any_job(fresh_checkout, name):
    settings, expected = CASES[name]
    checkout = fresh_checkout
    (checkout.folder / "tiny.txt").write_text("One line of text is no corpus.\n")
    kept = checkout.folder / "results/base/metrics.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    checkout.configure(settings)
    code, output = checkout.finish(checkout.start(*checkout.snakemake()))
    assert code != 0
    assert expected in output
    assert "Traceback" not in output
    message = output[output.index("profiles/tiny/settings.yaml") if "profiles/tiny/settings.yaml" in output else 0 :]
    assert len(message.strip().splitlines()) <= 2, message
    assert kept.read_text() == "{}"
    assert not (checkout.folder / "results/jobs").exists()

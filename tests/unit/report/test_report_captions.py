"""Captions for `snakemake --report`: those that the rules name are there, and each becomes readable text."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils.core import publish_doctree
from jinja2 import Environment, StrictUndefined

WORKFLOW = Path(__file__).parents[3] / "workflow"
WILDCARDS = {
    "figure.rst": [
        {"figure": name}
        for name in ("loss", "timeline", "cost", "kv_cache", "batch_size", "batch_size_curve", "another")
    ],
    "evaluate.rst": [{"stage": "sft"}],
    "benchmark.rst": [{"benchmark": name} for name in ("training", "kv_cache", "first_token", "compile", "batch_size")],
    "training.rst": [{}],
    "report.rst": [{}],
}


def test_each_caption_of_a_rule_is_there():
    rules = (WORKFLOW / "rules").glob("*.smk")
    named = {name for rule in rules for name in re.findall(r'caption="\.\./report/([^"]+)"', rule.read_text())}
    assert named
    assert named <= set(WILDCARDS)
    assert {path.name for path in (WORKFLOW / "report").glob("*.rst")} == set(WILDCARDS)


@pytest.mark.parametrize("name", sorted(WILDCARDS))
def test_a_caption_is_a_sentence_or_more(name):
    template = Environment(undefined=StrictUndefined).from_string((WORKFLOW / "report" / name).read_text())
    for wildcards in WILDCARDS[name]:
        text = template.render(snakemake=SimpleNamespace(wildcards=SimpleNamespace(**wildcards)))
        assert "{" not in text
        assert text.strip().endswith(".")
        # Any warning of the reStructuredText parser is an error.
        publish_doctree(text, settings_overrides={"halt_level": 2, "report_level": 5})

"""A profile's requests, read as Snakemake reads them, before any workflow runs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from snakemake.api import SNAKEFILE_CHOICES
from snakemake.cli import get_argument_parser, parse_set_resources, parse_set_threads
from snakemake.common.tbdstring import TBDString
from snakemake.exceptions import ResourceConversionError, ResourceValidationError
from snakemake.profiles import ProfileConfigFileParser
from snakemake.resources import Resource, Resources, SizedResources, TimeResources
from snakemake_interface_common.exceptions import WorkflowError

from . import resources
from .resources import Request

RUNS = "shell|run|script|notebook|wrapper|cwl|template_engine"  # what a rule with a job of its own has one of


@dataclass
class Profile:
    """What a profile says of jobs. `requests` are those of the rules it names, and "(default)"; `without_effect` is what Snakemake
    and the plugin pass over without a word, with a hint at what may be meant."""

    file: Path
    requests: dict[str, Request]
    without_effect: list[tuple[str, str]]


def load(profile: Path) -> Profile:
    """Raises ValueError with file and key when it cannot be read, or asks for what contradicts itself."""
    file = _file(profile)
    try:
        content = _content(file)
        default = _evaluated(
            _parsed(content, "default-resources", partial(Resources.parse, allow_expressions=True)), "default-resources"
        )
        rules = {
            rule: _evaluated(asked, f"set-resources: {rule}")
            for rule, asked in _parsed(content, "set-resources", parse_set_resources).items()
        }
        threads = _evaluated(_parsed(content, "set-threads", parse_set_threads), "set-threads")
        requests = {}
        for rule in ["(default)", *dict.fromkeys([*threads, *rules])]:
            asked = {**default, **rules.get(rule, {})}
            if asked.get("gpu_model"):
                asked.setdefault("gpu", 1)  # how many is the rule's to say; a run's start checks that number
            count = threads.get(rule, 1)
            if not isinstance(count, int):
                raise ValueError(f"set-threads: {rule} = {count}: must be a whole number")
            requests[rule] = resources.read(rule, asked, count)
        passed_over = [*_unknown_rules(content), *_unknown_resources(content)]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Profile(file, requests, [(f"{file}: {what}", hint) for what, hint in passed_over])


def _unknown_rules(content: dict[str, Any]) -> list[tuple[str, str]]:
    rules = workflow_rules(Path(content["snakefile"])) if "snakefile" in content else workflow_rules()
    if rules is None:
        return []
    running = [rule for rule, runs in rules.items() if runs]
    found = []
    for key in ("set-resources", "set-threads"):
        for rule in dict.fromkeys(re.split("[:=]", pair)[0] for pair in _pairs(content, key)):
            if rule not in running:
                what = "runs no job itself" if rule in rules else "no such rule"
                found.append((f"{key}: {rule}: {what}; this has no effect", _hint(rule, running)))
    return found


def _unknown_resources(content: dict[str, Any]) -> list[tuple[str, str]]:
    # One that the workflow's own rules share out, downloads for example.
    shared = {pair.partition("=")[0] for key in ("resources", "set-resource-scopes") for pair in _pairs(content, key)}
    known, found = known_resources(shared), []
    for key in ("default-resources", "set-resources"):
        for where, _, _ in dict.fromkeys(pair.partition("=") for pair in _pairs(content, key)):
            name = where.rpartition(":")[2]
            if name not in known:
                what = f"{key}: {where.replace(':', ': ')}: no such resource; this has no effect"
                found.append((what, meant_resource(name, known) or _hint(name, sorted(known))))
    return found


def known_resources(shared: Iterable[str]) -> set[str]:
    """Names that Snakemake, the plugin or a workflow that shares out `shared` make something of."""
    sizes = {name + unit for name in SizedResources for unit in ("", "_mb", "_mib")}
    return {*resources.KEYS, *TimeResources, *sizes, "tmpdir", *shared}


def meant_resource(name: str, known: set[str]) -> str | None:
    """What a user who writes an unknown name may mean."""
    word = resources.OTHER_WORDS.get(name) or next(iter(get_close_matches(name, known, n=1)), None)
    return f"did you mean {word}?" if word else None


def _hint(name: str, names: list[str]) -> str:
    similar = get_close_matches(name, names, n=1)
    return f"did you mean {similar[0]}?" if similar else f"there are {', '.join(names)}"


def workflow_rules(snakefile: Path | None = None) -> dict[str, bool] | None:
    """The rules of a workflow, here by default, and whether they run anything; None where its text does not tell.

    Snakemake itself would have to run the workflow's own code for the answer, and this project's then writes its settings.
    """
    file = snakefile or next((choice for choice in SNAKEFILE_CHOICES if choice.exists()), None)
    if file is None or not file.is_file():
        return None
    text = file.read_text()
    if re.search(r"^\s*(module\s|use\s+rule\s)", text, re.MULTILINE):
        return None
    rules = {}
    blocks = re.split(r"^\s*(?:rule|checkpoint)\s+(\w+)\s*:", text, flags=re.MULTILINE)
    for name, block in zip(blocks[1::2], blocks[2::2], strict=True):
        rules[name] = bool(re.search(rf"^\s+({RUNS})\s*:", block, re.MULTILINE))
    for included in re.findall(r"^\s*include:\s*(.*)", text, re.MULTILINE):
        literal = re.fullmatch(r"([\"'])(.+)\1\s*(#.*)?", included.strip())
        inner = workflow_rules(file.parent / literal[2]) if literal else None
        if inner is None:
            return None
        rules |= inner
    return rules


def _file(profile: Path) -> Path:
    if profile.is_file():
        return profile
    files = [*sorted(profile.glob("config*.yaml")), *sorted(profile.glob("config*.yml"))]
    if not files:
        raise ValueError(f"{profile}: no such profile: a folder with config.yaml")
    return files[0]


def _content(file: Path) -> dict[str, Any]:
    """Flags -> values, where Snakemake's two ways to write pairs have become one: ["base:runtime=60"]."""
    try:
        written = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise ValueError("must hold `key: value` lines")
    flags = {flag.lstrip("-") for action in get_argument_parser()._actions for flag in action.option_strings}
    is_template = "__use_yte__" in written  # of yte: its keys may be instructions
    if unknown := [key for key in written if key not in flags and not is_template]:
        similar = get_close_matches(str(unknown[0]), flags, n=1)
        hint = f"Did you mean {similar[0]}?" if similar else "`snakemake --help` lists them."
        raise ValueError(f"{unknown[0]}: no such flag of Snakemake. {hint}")
    try:
        with file.open() as stream:
            return ProfileConfigFileParser().parse(stream) if written else {}
    except Exception as error:  # its own kind for what configargparse refuses, WorkflowError for the rest
        raise ValueError(" ".join(str(error).split())) from error


def _pairs(content: dict[str, Any], key: str) -> list[str]:
    pairs = content.get(key) or []
    pairs = [str(pair) for pair in pairs] if isinstance(pairs, list) else [str(pairs)]
    shape = "RULE:NAME=VALUE" if key == "set-resources" else "NAME=VALUE"
    for pair in pairs:
        name, equals, _ = pair.partition("=")
        if not equals or (":" in shape and ":" not in name):
            raise ValueError(f"{key}: {pair!r}: must be {shape}")
    return pairs


def _parsed(content: dict[str, Any], key: str, parse) -> dict[str, Any]:
    pairs = _pairs(content, key)
    try:
        return dict(parse(pairs))
    except (WorkflowError, ValueError) as error:
        raise ValueError(f"{key}: {' '.join(str(error).split())}") from error


def _evaluated(asked: dict[str, Resource], where: str) -> dict[str, Any]:
    values = {key: _value(f"{where}: {key}", resource) for key, resource in asked.items()}
    return {key: value for key, value in values.items() if value not in (None, "")}


def _value(where: str, resource: Resource) -> Any:
    """What Snakemake makes of a resource for a first attempt; None for what depends on the job's files or wildcards."""
    text = str(resource.raw)
    try:
        found = resource.evaluate(wildcards={}, input=[], attempt=1, threads=1, rulename="", async_run=None)
        value = found if found.is_evaluable() else found.value
        if found.is_evaluable() and text.isidentifier():
            raise ResourceValidationError
    except ResourceValidationError as error:
        raise ValueError(
            f"{where} = {text}: Snakemake takes it for Python, where it is no text: write \"'{text}'\", with both quotes"
        ) from error
    except ResourceConversionError as error:
        raise ValueError(f"{where}: must be a number; one with its unit goes into mem: 256GB") from error
    except Exception as error:  # whatever the expression raises
        if resource.raw is None or re.search(r"\b(input|wildcards)\b|\(", text):
            return None
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    if isinstance(value, Resource | TBDString):
        return None
    if isinstance(value, str) and re.match(r"\$\w|\$\{", value):
        raise ValueError(f"{where} = {value}: the environment has no such variable")
    return value

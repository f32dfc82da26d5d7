"""From `config.yaml` and what overlays it to a checked `Config`, and back to a commented file.

Bad settings are found here, before a job is queued: each error names the file that holds the key, the key, the value and
what would be right.
"""

import difflib
import hashlib
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nanochat.command_settings import stage_settings
from nanochat.config import ROTARY_REACH, TRAINED_STAGES, Base, Config, Settings, Stage
from nanochat.errors import UserError
from nanochat.files import whole_file, write_text

COMMAND_LINE = "--config"
DEFAULTS = (
    "# Settings of a run; this file is the full-size one for A100s. Every key may be left out, its value here is the default.\n"
    "# profiles/local/settings.yaml overlays it with a model that a laptop trains in minutes.\n"
    "# A stage runs again when one of its own keys changes, and then what depends on it; keys that change only how it runs\n"
    "# (checkpoints, validations, trackers, workers, ...) leave what is finished. Comments change nothing.\n\n"
)
OF_A_RUN = (
    "# All settings of a run, as its driver merged them: what its jobs read, whatever config.yaml says by then.\n\n"
)


def load(values: dict[str, Any], files: Iterable[str | Path] = ()) -> Config:
    """Check the merged settings. `files`, later ones first in rank, only tell where a key was set.

    Raises UserError with one line for each error.
    """
    sources = [(_shown(path), _read_yaml(path)) for path in files]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(each, sources) for each in error.errors(include_url=False)]
        raise UserError("\n".join(dict.fromkeys(lines))) from None
    problems = [
        f"{_origin(path, sources)}: {'.'.join(path)} = {value}: {message}"
        for path, value, message in _conflicts(config)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return config


def require_yaml(path: str | Path) -> None:
    """Raise UserError, with the line, where the file is no YAML: Snakemake's own message names neither."""
    if Path(path).exists():
        _read_yaml(path)


def load_files(files: Iterable[str | Path]) -> Config:
    """Merge YAML files, later ones over earlier ones, and check the result."""
    files = list(files)
    merged: dict[str, Any] = {}
    for path in files:
        _merge(merged, _read_yaml(path))
    return load(merged, files)


def require_writable(folder: str | Path) -> None:
    """Raise UserError unless files can be made in the folder (or in the nearest parent that exists)."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"results = {folder}: {existing} is a file. Name a folder.")
    probe = existing / f".writable.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"results = {folder}: cannot write to {existing} ({reason}). Name a writable folder.") from None


def write_stage_settings(config: Config, folder: str | Path, keep: bool = False, dry_run: bool = False) -> list[str]:
    """Write `<stage>.json` for every stage; a file whose content would not change is left alone, and so is its mtime.

    Where only neutral settings change, the mtime stays too: Snakemake would delete what is finished, and make the same again. So
    it does where settings are again those of the last real run, which `.ran/` keeps, after a dry run with others.

    keep     leave what is there as it is, and write only what is missing: a job that runs reads its file anew when it is restarted
    returns  the stages whose files have stayed what they were and should not have
    """
    kept = []
    for name, settings in stage_settings(config).items():
        path, ran = Path(folder) / f"{name}.json", Path(folder) / ".ran" / f"{name}.json"
        content = settings.model_dump_json(indent=2) + "\n"
        there = path.read_text() if path.exists() else None
        if there is not None and keep:
            if there != content:
                kept.append(name)
            continue
        if there is not None and not ran.exists():
            _write_with_mtime(ran, there, path.stat().st_mtime_ns)
        same = next((old for old in (ran, path) if old.exists() and _decides_as(settings, old.read_text())), None)
        mtime = same.stat().st_mtime_ns if same else None
        if there != content or mtime != path.stat().st_mtime_ns:
            _write_with_mtime(path, content, mtime)
        if not dry_run:
            _write_with_mtime(ran, content, path.stat().st_mtime_ns)
    return kept


def _write_with_mtime(path: Path, content: str, mtime_ns: int | None) -> None:
    """mtime_ns  None: now"""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mtime_ns is not None and path.exists() and (path.read_text(), path.stat().st_mtime_ns) == (content, mtime_ns):
        return
    with whole_file(path) as temporary:
        temporary.write_text(content)
        if mtime_ns is not None:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))


def _decides_as(settings: Settings, text: str) -> bool:
    """Whether the settings in `text` give the same result."""
    try:
        return type(settings).model_validate_json(text).decisive() == settings.decisive()
    except ValidationError:
        return False


def write_run_settings(config: Config, folder: str | Path) -> Path:
    """Write `run-<digest>.yaml`, all settings, and return its absolute path. Another run's file stays: its jobs may read it."""
    content = render_yaml(config, OF_A_RUN)
    path = Path(folder).absolute() / f"run-{hashlib.sha256(content.encode()).hexdigest()[:12]}.yaml"
    if not path.exists():
        write_text(path, content)
    return path


def render_yaml(config: Config, header: str = DEFAULTS) -> str:
    """`config.yaml` with every key explained by its description."""
    return header + "\n".join(_render(config, indent=0)).strip() + "\n"


def _render(settings: Settings, indent: int, explained: frozenset[str] = frozenset()) -> list[str]:
    """Lines of one section. Keys in `explained` were described just before and get no comment again."""
    lines: list[str] = []
    margin = "  " * indent
    shared: frozenset[str] = frozenset()
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        comment = [] if key in explained else textwrap.wrap(field.description or "", 108 - len(margin))
        if isinstance(value, Settings):
            if indent == 0:
                lines.append("")
            lines += [f"{margin}# {line}" for line in comment]
            lines.append(f"{margin}{key}:")
            lines += _render(value, indent + 1, shared)
            if isinstance(value, Stage):
                # mid and sft repeat the keys of base: explained once.
                shared = shared | frozenset(type(value).model_fields)
            continue
        if indent == 0:
            lines.append("")
        lines += [f"{margin}# {line}" for line in comment]
        lines += _render_value(key, value, margin)
    return lines


def _render_value(key: str, value: Any, margin: str) -> list[str]:
    if (
        isinstance(value, list)
        and value
        and (isinstance(value[0], Settings) or (isinstance(value[0], str) and len(str(value)) > 80))
    ):
        items = [item.model_dump(exclude_none=True) if isinstance(item, Settings) else item for item in value]
        return [f"{margin}{key}:"] + [f"{margin}  - {_flow(item)}" for item in items]
    return [f"{margin}{key}: {_flow(value)}".rstrip()]


def _flow(value: Any) -> str:
    if value is None:
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("\n...\n").strip()


def _conflicts(config: Config) -> Iterable[tuple[tuple[str, ...], Any, str]]:
    """What is wrong between settings that are fine one by one: (path, value, what is wrong and what would be right)."""
    model = config.model.resolved()
    if model.width % model.heads:
        nearest = min(
            (h for h in range(1, model.width + 1) if model.width % h == 0), key=lambda h: abs(h - model.heads)
        )
        yield ("model", "heads"), model.heads, f"does not divide the width {model.width}. Nearest that does: {nearest}."
    elif model.width // model.heads % 2:
        yield (
            ("model", "width"),
            model.width,
            f"gives heads of odd width {model.width // model.heads}; rotary embeddings need an even one.",
        )
    if model.heads % model.kv_heads:
        yield ("model", "kv_heads"), model.kv_heads, f"does not divide the {model.heads} heads."
    if config.model.window and "windows" not in model.additions:
        yield ("model", "window"), config.model.window, "has no effect unless model.additions names windows."
    if problem := _unfit_folder(config.results):
        yield ("results",), config.results, problem
    if config.corpus.paths and config.corpus.source != "directory":
        message = f"not read while corpus.source = {config.corpus.source}, which a profile's settings may say; write directory there."
        yield ("corpus", "paths"), _flow(config.corpus.paths), message
    if config.corpus.source == "directory" and not config.corpus.paths:
        yield ("corpus", "source"), "directory", "needs a file, a folder or a glob in corpus.paths."
    if config.batch_size.max_device_batch_size < 1:
        yield ("batch_size", "max_device_batch_size"), config.batch_size.max_device_batch_size, "must be at least 1."
    benchmark, reach = config.benchmark, ROTARY_REACH * config.train.base.sequence_length
    if "kv_cache" in benchmark.names and benchmark.prompt_tokens + benchmark.new_tokens > reach:
        message = f"with prompt_tokens = {benchmark.prompt_tokens} more than the {reach} positions of the model, {ROTARY_REACH} x train.base.sequence_length."
        yield ("benchmark", "new_tokens"), benchmark.new_tokens, message
    for name in TRAINED_STAGES:
        yield from _stage_conflicts(("train", name), getattr(config.train, name))


def _unfit_folder(results: str) -> str | None:
    """Why this cannot be the folder of a run: it stands in commands and in Snakemake's names of files, as it is."""
    if results.startswith("~"):
        return f"write the whole path: {os.path.expanduser(results)}."
    if not re.fullmatch(r"[\w./@%+=:,-]+", results):
        return "no spaces and no characters that a shell takes for its own."
    if os.path.normpath(results) != results:
        return f"write {os.path.normpath(results)}."
    return None


def _stage_conflicts(path: tuple[str, ...], stage: Stage) -> Iterable[tuple[tuple[str, ...], Any, str]]:
    devices = stage.ranks
    unit = stage.sequence_length * devices
    factors = f"{stage.sequence_length} x {devices} = {unit}"
    if stage.tokens_per_step % unit:
        below = stage.tokens_per_step // unit * unit
        nearest = ", ".join(str(n) for n in (below, below + unit) if n)
        yield (
            (*path, "tokens_per_step"),
            stage.tokens_per_step,
            f"not a multiple of sequence_length x GPUs = {factors}, so no batch size divides it. Nearest: {nearest}.",
        )
    elif stage.device_batch_size and stage.tokens_per_step // unit % stage.device_batch_size:
        rows = stage.tokens_per_step // unit
        fitting = [n for n in range(1, rows + 1) if rows % n == 0]
        below = max((n for n in fitting if n < stage.device_batch_size), default=1)
        above = min((n for n in fitting if n > stage.device_batch_size), default=rows)
        yield (
            (*path, "device_batch_size"),
            stage.device_batch_size,
            f"does not divide the {rows} rows that a step has on each device. Nearest: {below}, {above}.",
        )
    if stage.gpus % stage.nodes:
        below = stage.gpus // stage.nodes * stage.nodes
        nearest = ", ".join(str(n) for n in (below, below + stage.nodes) if n)
        yield (*path, "gpus"), stage.gpus, f"not the same number on each of {stage.nodes} nodes. Nearest: {nearest}."
    if stage.warmup_fraction + stage.decay_fraction > 1:
        total = f"{stage.warmup_fraction} + {stage.decay_fraction}"
        yield (
            (*path, "decay_fraction"),
            stage.decay_fraction,
            f"warmup_fraction + decay_fraction = {total} is more than 1.",
        )
    if isinstance(stage, Base):
        return
    for number, source in enumerate(stage.mixture):
        key = (*path, "mixture", str(number))
        if source.name == "jsonl" and not source.path:
            yield (*key, "path"), "(empty)", "source `jsonl` needs the path of a file."
        elif source.path and source.name != "jsonl":
            yield (*key, "path"), source.path, f"source `{source.name}` reads no file. Your own file is `name: jsonl`."
        elif source.path and not Path(source.path).is_file():
            yield (*key, "path"), source.path, "no such file."


def _explain(error: dict[str, Any], sources: list[tuple[str, Any]]) -> str:
    """One line for one of pydantic's errors."""
    path = tuple(str(part) for part in error["loc"])
    key, value, kind, context = ".".join(path), error["input"], error["type"], error.get("ctx", {})
    where = f"{_origin(path, sources, given=kind != 'missing')}: {key}"
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        similar = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
        elsewhere = [found for found in _all_keys() if found[-1] == path[-1]]
        # train.sft.steps was meant for sft, although only base has steps.
        meant_here = any(found[:-2] == path[:-2] for found in elsewhere) and len(path) > 2
        if similar:
            hint = f"Did you mean {'.'.join((*path[:-1], similar[0]))}?"
        elif elsewhere and not meant_here:
            hint = f"Did you mean {'.'.join(elsewhere[0])}?"
        else:
            hint = f"Known here: {', '.join(known)}."
        return f"{where}: no such setting. {hint}"
    if kind == "missing":
        return f"{where}: missing. It is required."
    shown = f"{where} = {_flow(value) or '(empty)'}" if not isinstance(value, dict) else where
    types = {
        "int_type": "not a whole number.",
        "float_type": "not a number."
        + (" YAML reads 1e-3 as text: write 0.001 or 1.0e-3." if re.fullmatch(r"-?\d+e-?\d+", str(value)) else ""),
        "string_type": "not a text.",
        "list_type": "not a list.",
        "bool_type": "not true or false.",
        "model_type": "not a section of keys.",
        "model_attributes_type": "not a section of keys.",
        "greater_than": f"must be more than {context.get('gt')}.",
        "greater_than_equal": f"must be at least {context.get('ge')}.",
        "less_than": f"must be less than {context.get('lt')}.",
        "less_than_equal": f"must be at most {context.get('le')}.",
        "multiple_of": f"must be a multiple of {context.get('multiple_of')}.",
        "literal_error": f"must be {context.get('expected')}.",
        "too_short": f"needs at least {context.get('min_length')} entry.",
        "string_too_short": "must not be empty.",
        "finite_number": "must be finite.",
    }
    return f"{shown}: {types.get(kind, error['msg'])}"


def name_origin(message: str, files: Iterable[str | Path]) -> str:
    """A message that begins with `key = value`, with the file that sets the key before it."""
    found = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*) = ", message)
    if not found:
        return message
    return f"{_origin(tuple(found[1].split('.')), [(_shown(path), _read_yaml(path)) for path in files])}: {message}"


def _origin(path: tuple[str, ...], sources: list[tuple[str, Any]], given: bool = False) -> str:
    """The file, last in rank, that sets the key. A key that none sets was `given` on the command line, or is a default:
    then the file that sets the closest thing around it."""
    for length in range(len(path), 0, -1):
        for name, content in reversed(sources):
            if _holds(content, path[:length]):
                return name
        if given:
            break
    return COMMAND_LINE if given or not sources else sources[0][0]


def _holds(content: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if isinstance(content, dict) and part in content:
            content = content[part]
        elif isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        else:
            return False
    return True


def _section(annotation: Any) -> type[Settings] | None:
    """The Settings class behind an annotation, through lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union):
        return next((found for found in map(_section, get_args(annotation)) if found), None)
    return None


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] | None = Config
    for part in path:
        if part.isdigit():
            continue
        field: FieldInfo | None = section.model_fields.get(part) if section else None
        section = _section(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _all_keys(section: type[BaseModel] = Config, prefix: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    for key, field in section.model_fields.items():
        yield (*prefix, key)
        inner = _section(field.annotation)
        if inner:
            yield from _all_keys(inner, (*prefix, key))


def _shown(path: str | Path) -> str:
    """The path as a user would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one place: YAML drops the first one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands there twice", key.start_mark
                )
            if key.value != "<<":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).replace(' in "<unicode string>",', ",")
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: must hold `key: value` lines.")
    return content or {}


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value

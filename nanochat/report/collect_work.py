"""What the stages measured: training, plans, scores, samples, benchmarks, tokenizer, corpus."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanochat.report.numbers import Numbers
from nanochat.report.read import Run, number, text
from nanochat.report.steps import TRAINED, Step, surviving
from nanochat.report.words import WORDS

BENCHMARKS = {
    "training": "training before/after was not measured",
    "batch_size": "speed over the batch size was not measured",
    "compile": "what compiling takes and gives was not measured",
    "kv_cache": "decoding with and without KV cache was not measured",
    "first_token": "the first-token test was not run",
}
PEERS = ("transformers_static", "transformers_dynamic", "vllm", "llama_cpp")
CENTRED = ("centred_score", "centered_score", "centred", "centered")


def read_benchmarks(run: Run) -> dict[str, dict[str, Any]]:
    """`benchmark/<name>.json` with its rows; {} where it was not run."""
    found = {}
    for name, otherwise in BENCHMARKS.items():
        content = run.object(f"benchmark/{name}.json", otherwise)
        rows = content.get("rows")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if content and not rows:
            run.note(f"`benchmark/{name}.json` holds no rows.")
        found[name] = {**content, "rows": rows} if rows else {}
    return found


def training(numbers: Numbers, metrics: Mapping[str, dict], steps: Mapping[str, Sequence[Step]]) -> None:
    """One row a stage, from its metrics.json; losses from log.jsonl where the metrics do not have them."""
    for stage in TRAINED:
        if not metrics[stage]:
            continue
        log = [step.loss for step in surviving(steps[stage]) if step.loss is not None]
        from_log = {"loss_first": log[0], "loss_last": log[-1]} if log else {}
        device = text(metrics[stage].get("device"))
        for key, unit, why in (
            ("steps", "count", None),
            ("tokens", "count", None),
            ("seconds", "seconds", None),
            ("tokens_per_second", "tokens/s", None),
            ("mfu", "fraction", f"no peak is known for {device or 'this device'}"),
            ("peak_memory_bytes", "bytes", "not measured on this device"),
            ("gpu_utilization", "fraction", "no GPU, or NVML did not answer"),
            ("padding_fraction", "fraction", "rows are cut from a stream: no padding"),
            ("loss_first", "nats/token", None),
            ("loss_last", "nats/token", None),
            ("val_bpb", "bits/byte", None),
            ("restarts", "count", None),
            ("gpus", "count", None),
        ):
            value, method = number(metrics[stage].get(key)), f"{stage}/metrics.json"
            if value is None and key in from_log:
                value, method = from_log[key], f"{stage}/log.jsonl"
            numbers.add("training", stage, key, value, unit, device=device, method=method, missing=why)
        for key in ("startup_seconds", "compile_seconds", "validation_seconds", "checkpoint_seconds"):
            if key in metrics[stage]:
                value = number(metrics[stage][key])
                numbers.add("training", stage, key, value, "seconds", device=device, method=f"{stage}/metrics.json")
        for key in ("device", "dtype", "compiled"):
            value = metrics[stage].get(key)
            value = value if isinstance(value, bool) else text(value)
            numbers.add("training", stage, key, value, method=f"{stage}/metrics.json")


def plans(numbers: Numbers, found: Mapping[str, dict], metrics: Mapping[str, dict]) -> None:
    """The batch-size plan of each trained stage."""
    for stage in TRAINED:
        plan = found[stage]
        if not plan:
            continue
        device = text(plan.get("device")) or text(metrics[stage].get("device"))
        override = plan.get("source") == "override"
        why = "not measured: the batch size is set in the config" if override else "not recorded"
        for key, unit in (
            ("device_batch_size", "count"),
            ("grad_accum_steps", "count"),
            ("tokens_per_step", "count"),
            ("max_device_batch_size", "count"),
            ("peak_bytes", "bytes"),
            ("capacity_bytes", "bytes"),
            ("margin", "fraction"),
            ("seconds", "seconds"),
        ):
            value = number(plan.get(key))
            numbers.add("plans", stage, key, value, unit, device=device, method="batch_size/<stage>.json", missing=why)
        numbers.add("plans", stage, "probes", len(probes(plan)), "count", device=device, method="probes that were run")
        numbers.add("plans", stage, "source", text(plan.get("source")))
        numbers.add("plans", stage, "reason", text(plan.get("reason") or plan.get("why")))


def probes(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The probes of a plan that name a batch size."""
    rows = plan.get("probes")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in rows if number(row.get("device_batch_size"))]


def scores(run: Run, numbers: Numbers) -> None:
    """One row a task, a column a stage, chance beside them."""
    contents = {stage: run.object(f"evaluate/{stage}.json", f"`{stage}` was not evaluated") for stage in TRAINED}
    by_stage = {stage: dict(tasks(content)) for stage, content in contents.items()}
    for name in dict.fromkeys(name for found in by_stage.values() for name in found):
        is_bits = name == "bits_per_byte"
        unit = "bits/byte" if is_bits else "fraction"
        why = "there is no chance level: lower is better" if is_bits else "not recorded"
        for key, names, kind in (("chance", ("baseline", "chance"), unit), ("items", ("items", "problems"), "count")):
            values = (number(found.get(name, {}).get(one)) for found in by_stage.values() for one in names)
            value = next((value for value in values if value is not None), None)
            method = "evaluate/<stage>.json"
            numbers.add("scores", name, key, value, kind, method=method, missing=why if key == "chance" else None)
        words = (text(found.get(name, {}).get("description")) for found in by_stage.values())
        numbers.add("scores", name, "description", next((one for one in words if one), None), missing="nothing to say")
        for stage, found in by_stage.items():
            task, device, method = found.get(name, {}), text(contents[stage].get("device")), f"evaluate/{stage}.json"
            score = number(task.get("score"))
            ends = task.get("interval") if isinstance(task.get("interval"), list) else []
            ends = [number(end) for end in ends]
            around = ends if len(ends) == 2 and None not in ends else None
            about = {"device": device, "method": method, "missing": text(task.get("skipped")) or "not scored"}
            numbers.add("scores", name, stage, score, unit, **about, interval=around)
            centred = next((task[key] for key in CENTRED if key in task), None)
            if centred is not None:
                numbers.add(
                    "scores", name, f"{stage}_centred", number(centred), "fraction", device=device, method=method
                )
            if without := text(task.get("sandbox_without")):
                run.note(
                    f"`evaluate/{stage}.json`: {name} ran programs of the model without a namespace for {without}: not allowed there."
                )
            if task:
                numbers.add("scores", name, f"{stage}_seconds", number(task.get("seconds")), "seconds", method=method)


def tasks(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, task) with bits per byte and CORE as tasks among others, whichever form the file has."""
    found = content.get("tasks")
    if isinstance(found, dict):
        pairs = [(str(name), task) for name, task in found.items() if isinstance(task, dict)]
    elif isinstance(found, list):
        named = [(task.get("name") or task.get("task"), task) for task in found if isinstance(task, dict)]
        pairs = [(str(name), task) for name, task in named if name]
    else:
        pairs = []
    for key in ("bits_per_byte", "core"):
        value = content.get(key, content.get("CORE") if key == "core" else None)
        if not any(name == key for name, _ in pairs):
            if isinstance(value, dict):
                value = value.get("score", value.get("bits_per_byte"))
            if number(value) is not None:
                pairs.insert(0, (key, {"score": value}))
    for name, task in pairs:
        if name == "bits_per_byte" and "score" not in task:
            task = {**task, "score": task.get("bits_per_byte", task.get("val_bpb"))}
        if "score" in task:
            yield name, task


def samples(run: Run, numbers: Numbers) -> None:
    """What the model wrote after each stage, to the same prompts."""
    for stage in TRAINED:
        content = run.object(f"evaluate/{stage}.json")
        found = content.get("samples")
        if found is None and isinstance(content.get("tasks"), dict):
            found = content["tasks"].get("samples")
        if isinstance(found, dict):
            found = found.get("samples") or found.get("items")
        if not isinstance(found, list):
            continue
        for index, sample in enumerate(one for one in found if isinstance(one, dict)):
            prompt = text(sample.get("prompt") or sample.get("question"))
            answer = next(
                (sample[k] for k in ("text", "completion", "answer", "continuation", "reply") if k in sample), None
            )
            row = f"{stage} {index + 1}"
            method = f"evaluate/{stage}.json"
            kind = text(sample.get("kind")) or ("question" if "question" in sample else None)
            numbers.add("samples", row, "stage", stage, method=method)
            numbers.add("samples", row, "kind", kind, method=method)
            numbers.add("samples", row, "prompt", prompt, method=method)
            numbers.add("samples", row, "text", text(answer), method=method, missing="the model wrote nothing")


BENCHMARK_UNITS = {
    "depth": "count",
    "device_batch_size": "count",
    "batch_size": "count",
    "sequence_length": "count",
    "vocab_size": "count",
    "tokens_per_second": "tokens/s",
    "real_tokens_per_second": "tokens/s",
    "mfu": "fraction",
    "peak_memory_bytes": "bytes",
    "spread": "fraction",
    "ms_per_step": "milliseconds",
    "floor_fraction": "fraction",
    "predicted_tokens_per_second": "tokens/s",
    "samples": "count",
    "distinct": "count",
    "chi2": "number",
    "p_value": "number",
    "total_variation": "fraction",
    "compile_seconds": "seconds",
    "compile_warm_seconds": "seconds",
    "first_step_seconds": "seconds",
    "first_run_seconds": "seconds",
    "prefill_ms": "milliseconds",
    "padding_fraction": "fraction",
    "gpu_utilization": "fraction",
    "forward_backward_tokens_per_second": "tokens/s",
    "used_bytes": "bytes",
    "used_fraction": "fraction",
    "width": "count",
    "heads": "count",
    "grad_accum_steps": "count",
    "steps": "count",
    "degrees_of_freedom": "count",
}


def benchmarks(numbers: Numbers, found: Mapping[str, dict]) -> None:
    """Each row of each benchmark; its device, torch and command stand in the row `about`."""
    for name, content in found.items():
        if not content:
            continue
        device = text(content.get("device"))
        section = f"benchmark_{name}"
        for key in ("device", "torch", "commit", "dtype", "command", "notes"):
            why = "nothing to say" if key == "notes" else None
            value = commit(content) if key == "commit" else text(content.get(key))
            numbers.add(section, "about", key, value, method=f"benchmark/{name}.json", missing=why)
        for key, unit in (("choice", "count"), ("fastest", "count"), ("choice_over_fastest", "fraction")):
            if key in content:
                numbers.add(section, "about", key, number(content[key]), unit, method=f"benchmark/{name}.json")
        if name == "kv_cache":
            _beside_the_rows(numbers, content, device)
        for index, row in enumerate(content["rows"]):
            if name == "kv_cache" and row.get("batch_size") is None:
                continue  # a peer that is not installed: in `about`
            label = f"{index + 1}"
            # A curve is drawn; a table of it would bury the other rows.
            section = f"benchmark_{name}_curve" if row.get("case") == "curve" else f"benchmark_{name}"
            numbers.add(section, label, "case", text(row.get("case")))
            for key, value in row.items():
                if key == "case" or isinstance(value, list | dict):
                    continue
                projected = key.startswith("predicted")
                method = f"benchmark/{name}.json: median of repeated runs after a warm-up"
                if projected:
                    method = "projection from bytes and FLOPs, not measured"
                if isinstance(value, str | bool):
                    unit, value, missing = "text", value, None
                else:
                    unit, value = BENCHMARK_UNITS.get(key, "number"), number(value)
                    missing = _why(key, row, device)
                numbers.add(section, label, key, value, unit, device=device, method=method, missing=missing)
            against = _before(name, content["rows"], row)
            if against is not None:
                method = f"tokens/s over that of the row {against[1]}"
                numbers.add(section, label, "speedup", against[0], "times", device=device, method=method)


def _beside_the_rows(numbers: Numbers, content: Mapping[str, Any], device: str | None) -> None:
    """What kv_cache.json holds of serving, and why peers were not measured."""
    section, source = "benchmark_kv_cache", "benchmark/kv_cache.json"
    facts = {
        "mixed_fraction": ("mixed", "fraction", "fraction", 1),
        "capture_seconds": ("capture", "seconds", "seconds", 1),
        "capture_graphs": ("capture", "graphs", "count", 1),
        "long_prompt_tokens": ("long_prompt", "prompt_tokens", "count", 1),
        "long_prompt_ms": ("long_prompt", "seconds", "milliseconds", 1000),
        "long_prompt_over_floor": ("long_prompt", "over_floor", "times", 1),
        "deep_depth": ("deep", "depth", "count", 1),
        "deep_width": ("deep", "width", "count", 1),
        "deep_tokens_per_second": ("deep", "tokens_per_second", "tokens/s", 1),
        "deep_floor_fraction": ("deep", "floor_fraction", "fraction", 1),
    }
    for key, (fact, part, unit, scale) in facts.items():
        found = content.get(fact)
        value = number(found.get(part)) if isinstance(found, dict) else None
        if value is not None:
            numbers.add(section, "about", key, scale * value, unit, device=device, method=source)
    skipped = [text(row.get("skipped")) for row in content["rows"] if row.get("batch_size") is None]
    reasons = [why.removeprefix("skipped: ") for why in skipped if why]
    numbers.add(section, "about", "skipped", "; ".join(reasons) or None, method=source, missing="nothing to say")


def _why(key: str, row: Mapping[str, Any], device: str | None) -> str:
    if skipped := text(row.get("skipped")):
        rows = number(row.get("batch_size"))
        case = WORDS.get(str(row.get("case")), str(row.get("case")))
        return f"{case}{f' with {rows:,} rows' if rows else ''}: {skipped}"
    if key in ("ms_per_step", "floor_fraction") and device and row.get("case") in PEERS:
        return "another library's prefill and steps are one call"
    if key in ("outputs_equal", "within_tolerance") and row.get("case") in PEERS:
        return "other libraries have weights of their own"
    if key in ("mfu", "floor_fraction"):
        return f"no peak is known for {device or 'this device'}"
    return "not measured"


def _before(name: str, rows: Sequence[dict], row: dict) -> tuple[float, str] | None:
    """Speed against the first row of the stage (training, compile), or eager recomputation at the same size (kv_cache)."""

    def speed(one: dict) -> float | None:
        return number(one.get("real_tokens_per_second")) or number(one.get("tokens_per_second"))

    if name == "kv_cache":
        same = [one for one in rows if one.get("batch_size") == row.get("batch_size")]
        first = next((one for one in same if str(one.get("case")).startswith("recompute")), None)
        label = "recomputed eagerly at the same batch size"
    elif name in ("training", "compile"):
        first = next(one for one in rows if one.get("stage") == row.get("stage"))
        label = f"{text(first.get('case')) or 'first'} of the same stage"
    else:
        return None
    if first is None or not speed(first) or not speed(row):
        return None
    return speed(row) / speed(first), label


def tokenizer(run: Run, numbers: Numbers) -> None:
    """Bytes per token by kind of text, beside other encodings."""
    metrics = run.object("tokenizer/metrics.json", "the tokenizer was not trained")
    if not metrics:
        return
    source = "tokenizer/metrics.json"
    for key, unit in (
        ("vocab_size", "count"),
        ("train_bytes", "bytes"),
        ("train_seconds", "seconds"),
        ("encode_bytes_per_second", "bytes/s"),
    ):
        numbers.add("tokenizer", "about", key, number(metrics.get(key)), unit, method=source)
    numbers.add("tokenizer", "about", "note", text(metrics.get("note")), method=source, missing="nothing to say")
    kinds, reasons = metrics.get("bytes_per_token"), metrics.get("missing")
    reasons = reasons if isinstance(reasons, dict) else {}
    for kind, values in kinds.items() if isinstance(kinds, dict) else ():
        for encoding in ("nanochat", "gpt2", "gpt4"):
            value = number(values.get(encoding)) if isinstance(values, dict) else None
            numbers.add(
                "bytes_per_token",
                str(kind),
                encoding,
                value,
                "bytes/token",
                method=source,
                missing=text(reasons.get(encoding)) or ("not measured" if encoding == "nanochat" else "not available"),
            )


def corpus(run: Run, numbers: Numbers) -> None:
    """Documents, bytes and tokens, and the conversations of mid and sft."""
    manifest = run.object("corpus/manifest.json", "no corpus")
    shards = manifest.get("shards")
    shards = [shard for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []
    tokens = run.object("tokens/metrics.json", "the corpus was not tokenized")
    source = manifest.get("source")
    if isinstance(source, dict):
        source = source.get("source") or source.get("name") or "; ".join(f"{k} {v}" for k, v in source.items())
    numbers.add("corpus", "about", "source", text(source), method="corpus/manifest.json")
    numbers.add("corpus", "about", "provenance", _words(manifest.get("provenance")), method="corpus/manifest.json")
    for split in ("train", "validation"):
        own = [shard for shard in shards if shard.get("split") == split]
        numbers.add("corpus", split, "shards", len(own), "count", method="corpus/manifest.json")
        for key, unit in (("documents", "count"), ("text_bytes", "bytes")):
            values = [number(shard.get(key)) for shard in own]
            total = sum(values) if values and None not in values else None
            numbers.add("corpus", split, key, total, unit, method="corpus/manifest.json")
        count = number(tokens.get(f"{split}_tokens"))
        numbers.add("corpus", split, "tokens", count, "count", method="tokens/metrics.json", missing="not tokenized")
    for stage in ("mid", "sft"):
        metrics = run.object(f"conversations/{stage}/metrics.json", f"no conversations of `{stage}`")
        if not metrics:
            continue
        counts = metrics.get("sources") or metrics.get("counts") or {}
        for name, count in counts.items() if isinstance(counts, dict) else ():
            if isinstance(count, dict):
                count = count.get("conversations", count.get("count"))
            source = f"conversations/{stage}/metrics.json"
            numbers.add("conversations", str(name), stage, number(count), "count", method=source)


def _words(value: Any) -> str | None:
    """Provenance in words: `repo id: x; commit: y; files: a, b and 12 more`."""
    if not isinstance(value, dict):
        return text(value)
    parts = []
    for key, part in value.items():
        if isinstance(part, list):
            names = [str(one.get("file", one) if isinstance(one, dict) else one) for one in part]
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            part = ", ".join(names[:3]) + more
        if isinstance(part, str | int):
            parts.append(f"{key.replace('_', ' ')}: {part}")
    return text("; ".join(parts))


def measured(numbers: Numbers, metrics: Mapping[str, dict], found: Mapping[str, dict]) -> None:
    """Device, torch and commit of everything that was measured."""
    for name, content in [*metrics.items(), *((f"benchmark {key}", value) for key, value in found.items())]:
        if not content:
            continue
        for key in ("device", "torch"):
            numbers.add("measured", name, key, text(content.get(key)))
        numbers.add("measured", name, "gpus", number(content.get("gpus")), "count", method="as the stage saw them")
        numbers.add("measured", name, "commit", commit(content))


def commit(content: Mapping[str, Any]) -> str | None:
    """The code's commit, short; `-dirty` where files were changed since."""
    full = text(content.get("commit"))
    if full is None:
        return None
    digest, _, state = full.partition("-")
    return digest[:10] + (f"-{state}" if state else "")

"""Jobs, cost and the run as a whole: from its files to the numbers of the report."""

from dataclasses import dataclass, field
from typing import Any

from nanochat.config import Cost
from nanochat.report import collect_work
from nanochat.report.cost import LOST, USEFUL, Account, account
from nanochat.report.ledger import Attempt, busy_seconds, read_attempts, waits
from nanochat.report.numbers import Numbers
from nanochat.report.read import Run, number
from nanochat.report.steps import TRAINED, Step, read_steps

FORMAT = 1

LEDGER = "jobs/ledger.jsonl: ended - started"


@dataclass
class Collected:
    """What the report prints, and what the figures draw."""

    run: Run
    now: float
    numbers: Numbers
    attempts: list[Attempt]
    account: Account
    steps: dict[str, list[Step]]
    plans: dict[str, dict[str, Any]]
    benchmarks: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """report.json."""
        return {
            "format": FORMAT,
            "written_unix_seconds": round(self.now),
            "missing": self.run.notes,
            "values": self.numbers.entries,
        }


def collect(run: Run, cost: Cost, now: float) -> Collected:
    """Read everything that is there. `now`, unix seconds: until when jobs that still run are counted."""
    attempts = read_attempts(run, now)
    steps = {stage: read_steps(run, stage) for stage in TRAINED}
    metrics = {
        stage: run.object(
            f"{stage}/metrics.json", f"stage `{stage}` has not finished; its scores and totals are left out"
        )
        for stage in TRAINED
    }
    plans = {stage: run.object(f"batch_size/{stage}.json", f"no batch-size plan of `{stage}`") for stage in TRAINED}
    in_ledger = {one.stage for one in attempts if one.started is not None}
    for stage in TRAINED:
        if attempts and stage not in in_ledger and (metrics[stage] or steps[stage]):
            run.note(f"`{stage}` was trained by no job of the ledger (by hand?): its hours are in no sum.")
    benchmarks = collect_work.read_benchmarks(run)
    saves = {stage: number(metrics[stage].get("checkpoint_seconds")) or 0.0 for stage in TRAINED}
    found = Collected(run, now, Numbers(), attempts, account(attempts, steps, saves), steps, plans, benchmarks, metrics)
    _run(found, cost)
    collect_work.scores(run, found.numbers)
    collect_work.samples(run, found.numbers)
    collect_work.training(found.numbers, metrics, steps)
    collect_work.plans(found.numbers, plans, metrics)
    _jobs(found)
    _cost(found, cost)
    collect_work.benchmarks(found.numbers, benchmarks)
    collect_work.tokenizer(run, found.numbers)
    collect_work.corpus(run, found.numbers)
    collect_work.measured(found.numbers, metrics, benchmarks)
    return found


def _run(found: Collected, cost: Cost) -> None:
    """The run at a glance: what the headline says."""
    run, numbers, books = found.run, found.numbers, found.account
    last = next((stage for stage in reversed(TRAINED) if found.metrics[stage]), None)

    def add(key: str, value: Any, unit: str = "text", **more: Any) -> None:
        numbers.add("run", "run", key, value, unit, **more)

    sizes = run.object(f"{last}/config.json").get("model", {}) if last else {}
    sizes = sizes if isinstance(sizes, dict) else {}
    add("last_stage", last, missing="no stage has finished training")
    add(
        "parameters",
        run.parameters(f"{last}/model.safetensors") if last else None,
        "short",
        method="shapes in model.safetensors",
        missing="no model.safetensors",
    )
    add("depth", number(sizes.get("depth")), "count", method="config.json of the model")
    add("width", number(sizes.get("width")), "count", method="config.json of the model")
    trained = [found.metrics[stage] for stage in TRAINED if found.metrics[stage]]
    known = [number(one.get("seconds")) for one in trained if number(one.get("seconds")) is not None]
    add(
        "training_seconds",
        sum(known) if known else None,
        "seconds",
        method="metrics.json, seconds, sum over the stages",
    )
    tokens = [number(one.get("tokens")) for one in trained if number(one.get("tokens")) is not None]
    add("training_tokens", sum(tokens) if tokens else None, "short", method="metrics.json, tokens, sum over the stages")
    devices = list(dict.fromkeys(str(one["device"]) for one in trained if one.get("device")))
    add("device", ", ".join(devices) or None)
    gpus = [number(one.get("gpus")) or 0 for one in trained]
    add("gpus", max(gpus) if gpus else None, "count", method="metrics.json: the most that a stage trained on")

    starts = [one.submitted or one.started for one in found.attempts if one.submitted or one.started]
    ends = [one.ended for one in found.attempts if one.ended is not None]
    add(
        "wall_seconds",
        max(ends) - min(starts) if starts and ends else None,
        "seconds",
        method="from the first submission to the last end (for what still runs: to the writing of this report)",
        missing="no ledger of jobs",
    )
    add("busy_seconds", busy_seconds(found.attempts), "seconds", method="of that, with at least one job running")
    add("jobs", len({one.stage for one in found.attempts}), "count", method="jobs/ledger.jsonl")
    add("attempts", len(found.attempts), "count", method="jobs/ledger.jsonl")
    cancelled = sum(one.state == "CANCELLED" for one in found.attempts)
    failed = sum(one.is_failed for one in found.attempts) - cancelled
    add("attempts_failed", failed, "count", method="jobs/ledger.jsonl")
    add("attempts_cancelled", cancelled, "count", method="jobs/ledger.jsonl")
    add("attempts_interrupted", sum(one.is_interrupted for one in found.attempts), "count", method="jobs/ledger.jsonl")
    missing = None if found.attempts else "no ledger of jobs"
    for resource in ("GPU", "CPU"):
        hours = None if missing else books.hours(resource)
        add(f"{resource.lower()}_hours", hours, "hours", method=f"sum over all attempts: {LEDGER}", missing=missing)
    money = None if missing else books.money(cost.gpu_hour_price, cost.cpu_hour_price)
    add("money", money, cost.currency, method="hours x configured price", missing=missing)
    add("gpu_hour_price", cost.gpu_hour_price, cost.currency, method="cost.gpu_hour_price in config.yaml")
    add("cpu_hour_price", cost.cpu_hour_price, cost.currency, method="cost.cpu_hour_price in config.yaml")
    add("goodput", books.goodput(), "fraction", method="useful / charged", missing="nothing was charged")
    add("resource", books.resource, method="what the account counts: GPUs, or CPU cores in a run that holds none")
    add("written", found.now, "unix seconds", method="UTC")


def _jobs(found: Collected) -> None:
    numbers, wait = found.numbers, waits(found.attempts)
    without_cpus = sum(1 for one in found.attempts if one.started is not None and one.cpus is None)
    if without_cpus:
        found.run.note(
            f"{without_cpus:,} attempts have no CPU count in the ledger: their CPU-hours are not in the sums."
        )
    for charge in found.account.charges:
        one = charge.attempt
        row = f"{one.job_id} attempt {one.attempt} restart {one.restart}"
        queued, delayed = wait[one.identity]
        never = "never started" if one.started is None else "end not recorded"
        values = {
            "stage": (one.stage, "text", None),
            "job_id": (one.job_id, "text", None),
            "node": (one.nodes, "text", "not recorded"),
            "partition": (one.partition, "text", "no partition: a local job"),
            "attempt": (one.attempt, "count", None),
            "restart": (one.restart, "count", None),
            "queued": (queued if delayed is None else delayed, "seconds", never),
            "ran": (one.seconds if one.ended is not None else None, "seconds", never),
            "state": (one.state, "text", None),
            "gpus": (one.gpus, "count", None),
            "cpus": (one.cpus, "count", "no CPU count in the ledger"),
            "gpu_hours": (charge.hours("GPU"), "hours", None),
            "cpu_hours": (charge.hours("CPU") if one.cpus else None, "hours", "no CPU count in the ledger"),
            "remark": (_remark(one), "text", "nothing to say"),
        }
        for key, (value, unit, missing) in values.items():
            numbers.add("jobs", row, key, value, unit, method="jobs/ledger.jsonl", missing=missing)


def _remark(one: Attempt) -> str | None:
    parts = []
    if one.state != "COMPLETED" and one.reason:
        parts.append(one.reason)
    if one.exit_code:
        parts.append(f"exit code {one.exit_code}")
    if one.end_is == "now":
        parts.append("was running when this was written: counted until then")
    elif one.end_is == "bounded":
        parts.append("its end was not recorded: counted until the next start of the same job")
    elif one.end_is == "silent":
        parts.append("its end was not recorded: counted until the last line of its log")
    elif one.end_is == "unknown":
        parts.append("its end was not recorded: not counted")
    return "; ".join(parts) or None


def _cost(found: Collected, cost: Cost) -> None:
    numbers, books, resource = found.numbers, found.account, found.account.resource
    if not found.attempts:
        return
    charged = books.hours(resource)

    def add(row: str, hours: float | None, meaning: str, missing: str | None = None, of: float = charged) -> None:
        method = f"jobs/ledger.jsonl and log.jsonl of the trained stages; {resource}-hours"
        share = hours / of if hours is not None and of > 0 else None
        why = missing or "nothing was charged"
        numbers.add("cost", row, "hours", hours, "hours", method=method, missing=missing)
        numbers.add("cost", row, "share", share, "fraction", method=method, missing=why)
        numbers.add("cost", row, "meaning", meaning)

    amount = "GPUs" if resource == "GPU" else "CPU cores"
    add("charged", charged, f"{amount} x (ended - started), over all attempts")
    add("useful", books.hours(resource, USEFUL), "steps that survive into a final model")
    add("lost", books.lost(resource), "charged - useful; the lines below split it")
    for part, meaning in LOST.items():
        add(f"lost: {part}", books.hours(resource, part), meaning)
    use = {stage: number(found.metrics[stage].get("gpu_utilization")) for stage in TRAINED}
    use = {stage: value for stage, value in use.items() if value is not None and 0 <= value <= 1}
    if use and resource == "GPU":
        stages = ", ".join(use)
        meaning = (
            f"charged x (1 - mean utilisation by NVML), over {stages}, whose share it is; cuts across the split above"
        )
        add("idle", books.idle(use), meaning, of=books.hours("GPU", stages=use))
    else:
        why = "utilisation is measured on GPUs only" if resource == "CPU" else "no stage recorded its GPUs' utilisation"
        add("idle", None, "charged x (1 - mean utilisation)", missing=why)

    wait = waits(found.attempts).values()
    for key, index, method in (
        ("queue_wait", 0, "sum over all first starts: started - eligible (submitted where that is unknown)"),
        ("requeue_delay", 1, "sum over all restarts: from the end of an incarnation to the start of the next"),
    ):
        known = [pair[index] for pair in wait if pair[index] is not None]
        numbers.add("waiting", key, "sum", sum(known), "seconds", method=method)
        numbers.add("waiting", key, "most", max(known, default=0.0), "seconds", method=method)
        numbers.add("waiting", key, "starts", len(known), "count", method=method)
        numbers.add("waiting", key, "meaning", method)
    training = books.training_stages()
    for key, stages, method in (
        ("goodput", None, "useful / charged, over all jobs"),
        ("goodput_training", training, "useful / charged, over the jobs that train (base, mid, sft) alone"),
    ):
        numbers.add(
            "goodput", key, "share", books.goodput(stages), "fraction", method=method, missing="nothing was charged"
        )
        numbers.add("goodput", key, "meaning", method)

    for stage in books.stages():
        charges = [charge for charge in books.charges if charge.attempt.stage == stage]
        own = Account(charges)
        values = {
            "stage": (stage, "text"),
            "attempts": (len(charges), "count"),
            "ran": (sum(charge.attempt.seconds for charge in charges), "seconds"),
            "gpu_hours": (own.hours("GPU"), "hours"),
            "cpu_hours": (own.hours("CPU"), "hours"),
            "useful_hours": (own.hours(resource, USEFUL), "hours"),
            "lost_hours": (own.lost(resource), "hours"),
            "money": (own.money(cost.gpu_hour_price, cost.cpu_hour_price), cost.currency),
        }
        for key, (value, unit) in values.items():
            numbers.add("cost_by_stage", stage, key, value, unit, method="jobs/ledger.jsonl, sum over all attempts")

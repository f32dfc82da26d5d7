"""What a run cost: the one owner of GPU-hours, CPU-hours, charged, useful and lost.

    charged  = sum over all attempts of resource x (ended - started)
    useful   = of that, the time of the optimizer steps that survive into a final model
    lost     = charged - useful, split by cause (`LOST`)
    idle     = charged x (1 - mean utilisation), where utilisation was measured
    goodput  = useful / charged

The resource is the GPU; in a run that holds none it is the CPU core, and says so. Each second of an attempt goes to exactly
one part, so that useful + lost = charged for each attempt, each stage and the whole.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanochat.report.ledger import Attempt
from nanochat.report.steps import TRAINED, Step, median_seconds, surviving

USEFUL = "useful"
LOST = {
    "replayed": "steps done twice after a restart",
    "startup": "start-up and compile: from the start of an attempt to its first step, and what that step takes beyond a "
    "usual one",
    "failed": "failed and cancelled attempts: all but their steps",
    "checkpoints": "checkpoint writes",
    "grace": "grace: from the last step of an interrupted attempt to its end",
    "validation": "validation losses during training",
    "superseded": "completed, and run again later: all attempts of the earlier run but failed ones",
    "no_steps": "jobs that train no step: data, batch-size search, evaluation, benchmarks, this report",
    "rest": "the rest of training jobs: writing the model, what the log does not tell apart",
}
PARTS = (USEFUL, *LOST)

# The clocks of two machines differ a little.
SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class Charge:
    """One attempt and where its seconds went; the values sum to `attempt.seconds`."""

    attempt: Attempt
    seconds: Mapping[str, float]

    def hours(self, resource: str, part: str | None = None) -> float:
        """GPU- or CPU-core-hours of one part, or of all."""
        amount = self.attempt.gpus if resource == "GPU" else self.attempt.cpus or 0
        return amount / 3600 * (self.attempt.seconds if part is None else self.seconds.get(part, 0.0))


@dataclass(frozen=True)
class Account:
    """All attempts of a run."""

    charges: Sequence[Charge]

    @property
    def resource(self) -> str:
        """What is accounted for: GPU, or CPU in a run without any."""
        return "GPU" if self.hours("GPU") > 0 else "CPU"

    def hours(self, resource: str, part: str | None = None, stages: Iterable[str] | None = None) -> float:
        chosen = None if stages is None else set(stages)
        return sum(c.hours(resource, part) for c in self.charges if chosen is None or c.attempt.stage in chosen)

    def lost(self, resource: str) -> float:
        return sum(self.hours(resource, part) for part in LOST)

    def goodput(self, stages: Iterable[str] | None = None) -> float | None:
        """Useful / charged; None where nothing was charged."""
        stages = None if stages is None else list(stages)
        charged = self.hours(self.resource, stages=stages)
        return self.hours(self.resource, USEFUL, stages) / charged if charged > 0 else None

    def idle(self, utilization: Mapping[str, float]) -> float:
        """GPU-hours paid for and not used, over the stages whose mean utilisation (0 to 1) is known."""
        return sum(self.hours("GPU", stages=[stage]) * (1 - share) for stage, share in utilization.items())

    def training_stages(self) -> list[str]:
        return [stage for stage in self.stages() if stage in TRAINED]

    def stages(self) -> list[str]:
        """In the order of first submission."""
        return list(dict.fromkeys(charge.attempt.stage for charge in self.charges))

    def money(self, gpu_hour_price: float, cpu_hour_price: float) -> float:
        """CPU cores are charged in jobs that hold no GPU: a GPU's price includes the cores beside it."""
        cpu = sum(charge.hours("CPU") for charge in self.charges if not charge.attempt.gpus)
        return self.hours("GPU") * gpu_hour_price + cpu * cpu_hour_price


def account(
    attempts: Sequence[Attempt], steps: Mapping[str, Sequence[Step]], saves: Mapping[str, float] | None = None
) -> Account:
    """Split the time of every attempt.

    steps  the log of each trained stage, in the order written
    saves  seconds for which each stage waited for checkpoints, all in all: the one at an attempt's end is in no gap of the log
    """
    done: dict[tuple, list[Step]] = {}
    typical: dict[str, float | None] = {}
    for stage, log in steps.items():
        mine = [one for one in attempts if one.stage == stage and one.started is not None]
        done |= _steps_by_attempt(mine, log)
        typical[stage] = median_seconds(surviving(log))
    unseen = {}
    for stage, log in steps.items():
        seen = sum(step.checkpoint_seconds or 0.0 for step in log if step.survives)
        ends = sum(1 for one in attempts if one.stage == stage and done.get(one.identity))
        unseen[stage] = max(0.0, (saves or {}).get(stage, 0.0) - seen) / max(1, ends)
    completions: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(attempts):
        if one.state == "COMPLETED":
            completions[one.stage].append(place)
    charges = []
    for place, one in enumerate(attempts):
        # With the run that completed first, the attempts that it needed are superseded too.
        superseded = not one.is_failed and any(place <= earlier for earlier in completions[one.stage][:-1])
        parts = _split(one, done.get(one.identity, []), typical.get(one.stage), superseded, unseen.get(one.stage, 0.0))
        charges.append(Charge(one, parts))
    return Account(charges)


def _steps_by_attempt(attempts: Sequence[Attempt], log: Sequence[Step]) -> dict[tuple, list[Step]]:
    """Who did which step, by time; steps without a time go to the attempt that completed, or else to the last one."""
    found: dict[tuple, list[Step]] = defaultdict(list)
    if not attempts:
        return found
    fallback = next((one for one in reversed(attempts) if one.state == "COMPLETED"), attempts[-1])
    newest_first = sorted(attempts, key=lambda one: one.started, reverse=True)
    for step in log:
        if step.ended is None:
            found[fallback.identity].append(step)
            continue
        for one in newest_first:
            if one.ended is not None and one.started <= step.ended <= one.ended + SLACK_SECONDS:
                found[one.identity].append(step)
                break
    return found


def _split(
    attempt: Attempt, steps: Sequence[Step], typical: float | None, superseded: bool, last_save: float = 0.0
) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    left = attempt.seconds
    if superseded and attempt.stage in TRAINED and not any(step.survives for step in steps):
        return parts | {"superseded": left}

    def give(part: str, seconds: float) -> None:
        # Clocks of two machines disagree a little; what an attempt held is the ledger's word.
        nonlocal left
        taken = min(left, max(0.0, seconds))
        parts[part] += taken
        left -= taken

    compiling = 0.0
    for index, step in enumerate(steps):
        seconds = step.seconds or 0.0
        if index == 0 and typical is not None and seconds > typical:
            compiling, seconds = seconds - typical, typical
        give(USEFUL if step.survives else "replayed", seconds)
    if attempt.stage not in TRAINED:
        # Only a failure is told apart; a report that is running now is work like another.
        give("failed" if attempt.is_failed or attempt.is_interrupted else "no_steps", left)
    elif attempt.is_failed:
        give("failed", left)
    else:
        give("checkpoints", sum(step.checkpoint_seconds or 0.0 for step in steps))
        give("validation", sum(step.validation_seconds or 0.0 for step in steps))
        timed = [step for step in steps if step.ended is not None]
        if timed:
            first, last = timed[0], timed[-1]
            give("startup", first.ended - (first.seconds or 0.0) - attempt.started + compiling)
            if attempt.is_interrupted:
                give("grace", attempt.ended - last.ended)
        else:
            give("startup", left if attempt.is_interrupted and not steps else compiling)
        if steps and not attempt.is_interrupted:
            give("checkpoints", last_save)
        give("rest", left)
    return parts

"""The figures of the report: one style, colours that colour-blind readers tell apart (Okabe and Ito 2008).

Each figure is always written. What was not measured leaves a sentence in it instead of a curve, so that the workflow's
outputs exist whatever was run.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from nanochat.files import whole_file
from nanochat.report.collect import Collected
from nanochat.report.collect_work import probes
from nanochat.report.cost import LOST, USEFUL
from nanochat.report.numbers import amount, duration, hours
from nanochat.report.read import number
from nanochat.report.steps import TRAINED, smoothed, surviving
from nanochat.report.words import WORDS

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, LIGHT, INK = "#CC79A7", "#56B4E9", "#F0E442", "#8A8A8A", "#D9D9D9", "#222222"

STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
}
STAGE_COLOURS = {"base": BLUE, "mid": ORANGE, "sft": GREEN}
STAGE_NAMES = {"base": "base: pretraining", "mid": "mid: midtraining", "sft": "sft: finetuning"}
MARKERS = "osD^vPX*"
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.6f}".rstrip("0").rstrip("."))


def draw_all(found: Collected, folder: Path) -> list[Path]:
    """Write every figure; returns their paths."""
    figures: dict[str, Callable[[Collected], Figure]] = {
        "loss": loss,
        "timeline": timeline,
        "cost": cost,
        "kv_cache": kv_cache,
        "batch_size": batch_size,
        "batch_size_curve": batch_size_curve,
    }
    written = []
    # A user's matplotlibrc must not change the report.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        for name, draw in figures.items():
            figure = draw(found)
            FigureCanvasAgg(figure)
            with whole_file(folder / f"{name}.png") as temporary:
                figure.savefig(
                    temporary, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
                )
            written.append(folder / f"{name}.png")
    return written


def loss(found: Collected) -> Figure:
    """Training loss above, validation bits per byte below, a column a stage."""
    stages = [stage for stage in TRAINED if found.steps[stage]]
    if not stages:
        return _empty("No stage has logged a step.", "log.jsonl of base, mid and sft")
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, stage in enumerate(stages):
        steps = surviving(found.steps[stage])
        colour, above, below = STAGE_COLOURS[stage], axes[0][column], axes[1][column]
        line = [(step.step, step.loss) for step in steps if step.loss is not None]
        x, y = [point[0] for point in line], [point[1] for point in line]
        if len(line) >= 60:
            above.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
            above.plot(x, smoothed(y, len(y) // 40), color=colour)
        else:
            above.plot(x, y, color=colour, marker="o" if len(line) < 30 else None, markersize=3)
        held_out = [(step.step, step.val_bpb) for step in steps if step.val_bpb is not None]
        below.plot(*zip(*held_out, strict=True) if held_out else ((), ()), color=colour, marker="o", markersize=4)
        if held_out:
            # Above the frame, where no curve can run through it.
            below.set_title(f"last {held_out[-1][1]:.3f}", loc="right", fontsize=9, fontweight="normal", color=colour)
        else:
            _say(below, "no validation\nin the log")
        for restart in _restarts(found, stage):
            for axis in (above, below):
                axis.axvline(restart, color=GREY, linestyle=(0, (2, 2)), linewidth=1)
        above.set_title(STAGE_NAMES[stage])
        below.set_xlabel("optimizer step")
        below.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        below.xaxis.set_major_formatter(THOUSANDS)
    axes[0][0].set_ylabel("training loss (nats/token)")
    axes[1][0].set_ylabel("validation (bits/byte)")
    figure.align_ylabels(axes[:, 0])
    if any(_restarts(found, stage) for stage in stages):
        dashes = Line2D([], [], color=GREY, linestyle=(0, (2, 2)), label="went on from a checkpoint here")
        figure.legend(handles=[dashes], loc="outside lower right")
    return figure


def timeline(found: Collected) -> Figure:
    """When each job waited and ran; all attempts of a job stand in one row."""
    shown = [one for one in found.attempts if one.submitted is not None or one.started is not None]
    if not shown:
        return _empty("No ledger of jobs.", "jobs/ledger.jsonl")
    stages = list(dict.fromkeys(one.stage for one in shown))
    origin = min(one.submitted or one.started for one in shown)
    waiting = [found.now for one in shown if one.started is None and one.state == "PENDING"]
    span = (
        max(*waiting, *(max(one.ended or 0, one.started or 0, one.submitted or 0) for one in shown), origin + 1)
        - origin
    )
    unit, seconds = _time_unit(span)
    figure = Figure(figsize=(10.5, 1.5 + 0.34 * len(stages)), layout="constrained")
    axis = figure.subplots()
    used: dict[str, tuple[str, str | None]] = {}
    # A requeued job keeps its submission; it waits from the end of the incarnation before.
    requeued = {(one.job_id, one.attempt, one.restart + 1): one.ended for one in shown}
    for row, stage in enumerate(stages):
        end = 0.0
        for one in (one for one in shown if one.stage == stage):
            waited_from = requeued.get(one.identity) or one.submitted or one.eligible or one.started
            waited_to = one.started if one.started is not None else found.now if one.state == "PENDING" else waited_from
            if waited_to > waited_from:
                left, width = (waited_from - origin) / seconds, (waited_to - waited_from) / seconds
                axis.barh(row, width, left=left, height=0.3, color=LIGHT)
                used["waiting in the queue"] = (LIGHT, None)
            if one.started is None or one.ended is None:
                continue
            label, colour, hatch = _state(one)
            used[label] = (colour, hatch)
            axis.barh(
                row,
                max(one.seconds / seconds, span / seconds / 800),
                left=(one.started - origin) / seconds,
                height=0.66,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
            )
            end = max(end, (one.ended - origin) / seconds)
        ran = sum(one.seconds for one in shown if one.stage == stage)
        axis.text(end + span / seconds / 150, row, duration(ran), va="center", fontsize=8.5, color="#555555")
    axis.set_yticks(range(len(stages)), stages)
    axis.set_ylim(len(stages) - 0.4, -0.6)
    axis.set_xlim(0, span / seconds * 1.1)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlabel(f"time since the first submission ({unit})")
    axis.set_title("Jobs: waiting and running, all attempts")
    _legend(figure, used)
    return figure


def cost(found: Collected) -> Figure:
    """Where the hours went, by stage."""
    books = found.account
    resource = books.resource
    stages = [stage for stage in books.stages() if books.hours(resource, stages=[stage]) > 0]
    if not stages:
        return _empty("Nothing was charged.", "jobs/ledger.jsonl")
    colours = dict(
        zip((USEFUL, *LOST), (BLUE, YELLOW, ORANGE, RED, PURPLE, GREY, GREEN, "#5E3C58", SKY, LIGHT), strict=True)
    )
    labels = {
        USEFUL: "useful: steps in the final model",
        "replayed": "lost: replayed steps",
        "startup": "lost: start-up, compile",
        "failed": "lost: failed attempts",
        "checkpoints": "lost: checkpoint writes",
        "grace": "lost: grace",
        "validation": "lost: validation",
        "superseded": "lost: run again later",
        "no_steps": "jobs that train no step",
        "rest": "lost: rest of training jobs",
    }
    figure = Figure(figsize=(10.5, 1.7 + 0.34 * len(stages)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(stages)
    used: dict[str, tuple[str, str | None]] = {}
    for part, colour in colours.items():
        values = [books.hours(resource, part, [stage]) for stage in stages]
        if not any(values):
            continue
        axis.barh(range(len(stages)), values, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.5)
        left = [before + value for before, value in zip(left, values, strict=True)]
        used[labels[part]] = (colour, None)
    for row, total in enumerate(left):
        axis.text(total + max(left) / 150, row, hours(total), va="center", fontsize=8.5, color="#555555")
    axis.set_yticks(range(len(stages)), stages)
    axis.set_ylim(len(stages) - 0.4, -0.6)
    axis.set_xlim(0, max(left) * 1.1)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlabel(f"{resource}-hours, all attempts" + (" (no job held a GPU)" if resource == "CPU" else ""))
    axis.set_title("Cost by stage")
    _legend(figure, used)
    return figure


def kv_cache(found: Collected) -> Figure:
    """Decoding speed over the number of rows, a curve a case."""
    rows = found.benchmarks["kv_cache"].get("rows", [])
    cases: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        x, y = number(row.get("batch_size")), number(row.get("tokens_per_second"))
        if x and y and x > 0 and y > 0:
            cases.setdefault(str(row.get("case")), []).append((x, y))
    if not cases:
        return _empty("Decoding with and without a KV cache was not measured.", "benchmark/kv_cache.json")
    colours = {
        "recompute_eager": RED,
        "recompute_compiled": ORANGE,
        "cache_eager": SKY,
        "cache_graph": BLUE,
        "transformers_static": GREY,
        "transformers_dynamic": GREEN,
        "vllm": PURPLE,
        "llama_cpp": YELLOW,
    }
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axis = figure.subplots()
    fastest_first = sorted(cases.items(), key=lambda case: -max(case[1])[1])
    for index, (case, points) in enumerate(fastest_first):
        style = {"color": colours.get(case, INK), "marker": MARKERS[index % len(MARKERS)], "markersize": 5.5}
        axis.plot(*zip(*sorted(points), strict=True), **style, label=WORDS.get(case, case))
    sizes = sorted({point[0] for points in cases.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [amount(size) for size in sizes])
    axis.margins(x=0.09, y=0.12)
    low, high = axis.get_ylim()
    height = 0.8 * 72 * figure.get_figheight()  # of the axis, about
    _label_ends(axis, [max(points) for points in cases.values()], height / math.log(high / low))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(THOUSANDS)
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("rows decoded side by side")
    axis.set_ylabel("new tokens per second")
    device = found.benchmarks["kv_cache"].get("device")
    axis.set_title("Decoding speed" + (f", {device}" if device else ""))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def _label_ends(axis: Axes, ends: list[tuple[float, float]], points_per_unit: float) -> None:
    """The value at the end of each curve, beside it; where curves end together the upper labels make room.

    points_per_unit  typographic points of one unit of log(y), about
    """
    lowest: dict[float, float] = {}  # of the next label there, in points
    for x, y in sorted(ends, key=lambda end: end[1]):
        height = math.log(y) * points_per_unit
        raised = max(height, lowest.get(x, height))
        lowest[x] = raised + 9
        shown = amount(float(f"{y:.3g}"))
        beside = {"xytext": (7, raised - height), "textcoords": "offset points", "va": "center"}
        axis.annotate(shown, (x, y), **beside, fontsize=8.5, color=INK)


def batch_size(found: Collected) -> Figure:
    """Probes of the batch-size search: speed at the left, memory at the right."""
    plans = {stage: plan for stage, plan in found.plans.items() if probes(plan)}
    if not plans:
        why = (
            "The batch sizes were set in the config or taken from a cache: no probes."
            if any(found.plans.values())
            else None
        )
        return _empty(why or "No batch size was measured.", "batch_size/<stage>.json")
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharex=True)
    has_failed = False
    for index, (stage, plan) in enumerate(plans.items()):
        colour = STAGE_COLOURS.get(stage, INK)
        # Curves of stages that train alike lie on top of each other.
        dashes = ("-", (0, (5, 2)), (0, (2, 2)))[index % 3]
        style = {
            "color": colour,
            "marker": MARKERS[index],
            "markersize": 6.5 - index,
            "label": stage,
            "linestyle": dashes,
        }
        for axis, key, scale in ((speed, "tokens_per_second", 1.0), (memory, "peak_bytes", 1e9)):
            points = sorted(
                (probe["device_batch_size"], number(probe.get(key)) / scale)
                for probe in probes(plan)
                if probe.get("ok") is not False and number(probe.get(key))
            )
            if points:
                axis.plot(*zip(*points, strict=True), **style)
            chosen = [point for point in points if point[0] == plan.get("device_batch_size")]
            axis.plot(*zip(*chosen, strict=True) if chosen else ((), ()), "o", ms=13, mfc="none", mec=colour, mew=1.6)
        capacity = number(plan.get("capacity_bytes"))
        for probe in probes(plan):
            if probe.get("ok") is False:
                has_failed = True
                height = capacity / 1e9 if capacity else 0
                memory.plot(probe["device_batch_size"], height, "x", color=colour, ms=8, mew=2, clip_on=False)
    capacities = {number(plan.get("capacity_bytes")) for plan in plans.values()} - {None}
    tops = [number(probe.get("peak_bytes")) or 0 for plan in plans.values() for probe in probes(plan)]
    # A host's memory dwarfs a tiny model's: its line would flatten the curves.
    drawn = [size for size in capacities if has_failed or size < 8 * max(tops, default=0)]
    for size in drawn:
        memory.axhline(size / 1e9, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    _over_rows(speed, memory)
    handles, _labels = speed.get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="o", ms=11, mfc="none", mec=INK, mew=1.6, label="chosen"))
    if has_failed:
        handles.append(Line2D([], [], linestyle="", marker="x", ms=8, mew=2, color=INK, label="did not fit"))
    if drawn:
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="memory of the device"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def batch_size_curve(found: Collected) -> Figure:
    """Speed and memory over all batch sizes, eager and compiled, and what the plan chose."""
    content = found.benchmarks["batch_size"]
    rows = [row for row in content.get("rows", []) if number(row.get("device_batch_size"))]
    if not rows:
        return _empty("Speed and memory over the batch size were not measured.", "benchmark/batch_size.json")
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharex=True)
    for compiled, label, colour, marker in ((False, "eager", ORANGE, "s"), (True, "compiled", BLUE, "o")):
        own = [row for row in rows if bool(row.get("compile")) == compiled]
        for axis, key, scale in ((speed, "tokens_per_second", 1.0), (memory, "peak_memory_bytes", 1e9)):
            points = {row["device_batch_size"]: number(row.get(key)) for row in own if number(row.get(key))}
            line = [(size, value / scale) for size, value in sorted(points.items())]
            if line:
                axis.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5, label=label)
    handles, _labels = speed.get_legend_handles_labels()
    if choice := number(content.get("choice")):
        for axis in (speed, memory):
            axis.axvline(choice, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="the plan's choice"))
    _over_rows(speed, memory)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _over_rows(speed: Axes, memory: Axes) -> None:
    for axis in (speed, memory):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(THOUSANDS)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(THOUSANDS)
        axis.set_xlabel("rows of a micro-batch (device_batch_size)")
        axis.margins(x=0.08)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    speed.set_ylabel("tokens per second")
    speed.set_title("Speed")
    memory.set_ylabel("peak memory (GB)")
    memory.set_title("Memory")


def _empty(sentence: str, source: str) -> Figure:
    figure = Figure(figsize=(8.5, 1.6))
    axis = figure.subplots()
    axis.axis("off")
    axis.text(0.5, 0.62, sentence, ha="center", va="center", fontsize=12)
    axis.text(0.5, 0.28, f"It would be drawn from {source}.", ha="center", va="center", color=GREY)
    return figure


def _say(axis: Axes, sentence: str) -> None:
    axis.text(0.5, 0.5, sentence, ha="center", va="center", color=GREY, transform=axis.transAxes)
    axis.set_yticks([])


def _restarts(found: Collected, stage: str) -> list[int]:
    """Steps at which the log goes back, or at which another attempt goes on; not the first one: there a stage was begun anew."""
    log = found.steps[stage]
    back = [step.step for before, step in itertools.pairwise(log) if step.step <= before.step]
    starts = sorted(one.started for one in found.attempts if one.stage == stage and one.started is not None)
    timed = [step for step in surviving(log) if step.ended is not None]
    later = [
        step.step
        for before, step in itertools.pairwise(timed)
        if any(before.ended < start <= step.ended for start in starts)
    ]
    return sorted(step for step in {*back, *later} if step > 1)


def _state(one: Any) -> tuple[str, str, str | None]:
    if one.end_is == "now":
        return "running when this was written", SKY, None
    if one.is_failed:
        return "failed or cancelled", RED, "////"
    if one.is_interrupted:
        return "interrupted, requeued", ORANGE, "...."
    return "completed" if one.state == "COMPLETED" else one.state.lower(), BLUE, None


def _legend(figure: Figure, used: Mapping[str, tuple[str, str | None]]) -> None:
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for label, (c, h) in used.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)))


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, size, upto in (("seconds", 1, 180), ("minutes", 60, 3 * 3600), ("hours", 3600, 72 * 3600)):
        if seconds < upto:
            return unit, float(size)
    return "days", 86400.0

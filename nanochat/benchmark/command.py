"""Before/after measurements on this machine.

training     a training step as the study did it, then with each thing added that the trainer does
compile      what compiling a training step costs, cold and with a warm cache, and gives
trainer      the trainer as it runs: loader, update and checkpoints included, cold and warm compilers, one GPU and all of them
batch_size   speed, memory and utilisation over the rows of a micro-batch, and whether the plan's choice is the best one
plans        whether batch-size plans hold: how long the search takes, whether its maximum is one, whether training fits
attention    attention alone: what training uses, and each backend of torch
kv_cache     decoding with and without a cache of keys and values, over batch sizes
ablation     what the model's additions give in the same time: trains with and without each of them
decode_tiles what each kernel of a decode step costs, and which tiles of it are the fastest
first_token  do several samples of one prompt draw their first token independently?
float8       what the matrix products of a training step would gain in float8

Reads  --config, --plan, --model, --tokenizer, --conversations, each of them optional: without settings the study's shape (on a
       CPU a tiny one), without a model random weights, without conversations random tokens of usual lengths; ablation needs --tokens and --tokenizer
Writes --out/NAME.json

Needs torch, numpy, pydantic, safetensors and tiktoken, so that it runs on a bare GPU node: `python -m nanochat benchmark
training --out DIR`.
"""

import argparse
import operator
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nanochat import hardware
from nanochat.benchmark import (
    ablation,
    attention,
    batch_size,
    compile,
    decode_tiles,
    first_token,
    float8,
    kv_cache,
    plans,
    roofline,
    serving,
    trainer,
    training,
)
from nanochat.benchmark.models import random_model
from nanochat.command_settings import BenchmarkSettings
from nanochat.config import Benchmark, Model
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, write_json
from nanochat.infer.engine import Engine
from nanochat.infer.fused_step import unusable
from nanochat.model.files import load_model
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.progress import say
from nanochat.train.trainer import wants_compile
from nanochat.version import commit

NAMES = (
    "training", "compile", "trainer", "attention", "batch_size", "plans", "kv_cache", "decode_tiles", "first_token", "float8",
    "ablation",
)  # fmt: skip
FIRST_TOKEN_PROMPT = "The state of our Union is"
FIRST_TOKEN_SAMPLES = 4096
RANDOM_CONVERSATIONS = "random tokens of usual lengths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES, type=lambda name: name.replace("-", "_"), help="which measurement")
    parser.add_argument(
        "--config", help="settings of this stage (JSON); default: the study's shape, on a CPU a tiny one"
    )
    parser.add_argument("--plan", help="batch-size plan whose device_batch_size is used; default: found by doubling")
    parser.add_argument("--model", help="folder of a trained stage; default: random weights")
    parser.add_argument("--tokenizer", help="folder of the tokenizer stage")
    parser.add_argument(
        "--conversations", help="folder of encoded conversations; default: random ones of usual lengths"
    )
    parser.add_argument(
        "--steps", type=int, help="trainer, plans: steps of a row; default: 50 and 200, on a CPU 6 and 4"
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="trainer, plans, ablation, attention, float8: only this row (d12, d12_t2048, chosen); training: this stage or row (sft, study_compiled); "
        "kv_cache: this row or fact (cache_graph, mixed); decode_tiles: this batch size",
    )
    parser.add_argument(
        "--once", action="store_true", help="plans: search each plan once, do not try its maximum again"
    )
    parser.add_argument("--tokens", help="ablation: folder of the token shards")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"ablation: training time of a row, default {ablation.SECONDS:.0f}; "
        f"decode_tiles: of the search at a batch size, default {decode_tiles.SEARCH_SECONDS:.0f}",
    )
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    if arguments.name in ("batch_size", "trainer", "plans"):
        return run_in_processes(arguments)
    device = hardware.pick_device(None)
    if arguments.config:
        settings = read_settings(arguments.config, BenchmarkSettings)
        device = hardware.pick_device(min(settings.benchmark.gpus, 1))
    else:
        settings = default_settings(device)
    started = time.monotonic()
    compiles = wants_compile(settings.compile, device)
    notes = [] if compiles else ["not compiled: the settings say so, or this is a CPU"]
    if compiles and (reason := compiler_fails(device)):
        compiles = False
        notes.append(f"not compiled: {reason}")
    measurement = {
        "training": run_training,
        "compile": run_compile,
        "attention": run_attention,
        "float8": run_float8,
        "kv_cache": run_kv_cache,
        "decode_tiles": run_decode_tiles,
        "first_token": run_first_token,
        "ablation": run_ablation,
    }[arguments.name]
    torch.manual_seed(settings.seed)
    rows, facts = measurement(settings, device, compiles, arguments)
    facts |= {"dtype": str(hardware.resolve_dtype(settings.dtype, device)).removeprefix("torch."), "notes": notes}
    write(arguments, hardware.device_name(device), 1 if device.type == "cuda" else 0, started, facts, rows)


def write(
    arguments: argparse.Namespace, device: str, gpus: int, started: float, facts: dict, rows: Iterable[dict]
) -> None:
    """Write --out/NAME.json, anew after each of the rows: what was measured before an end that comes early is kept.

    facts  measuring the rows may still add to them
    Raises UserError when --case left no row.
    """
    path, done = Path(arguments.out) / f"{arguments.name}.json", []
    content = {
        "name": arguments.name,
        "device": device,
        "gpus": gpus,
        "torch": torch.__version__,
        "commit": commit(),
        "command": "nanochat " + " ".join(sys.argv[1:]),
    }

    def kept() -> None:
        done.sort(key=lambda row: row.get("batch_size") or 0)  # kv_cache: its cases beside each other
        write_json(path, content | facts | {"seconds": time.monotonic() - started, "rows": done})

    for row in rows:
        done.append(row)
        kept()
    absent = "there is no such row" if gpus else "there is no such row without a GPU"
    if arguments.case and not done and not facts.keys() & set(arguments.case):
        raise UserError(f"benchmark {arguments.name}: --case {' --case '.join(arguments.case)}: {absent}.")
    kept()
    say(f"benchmark {arguments.name}", f"wrote {path}")


def run_in_processes(arguments: argparse.Namespace) -> None:
    """Write batch_size.json, trainer.json or plans.json. This process stays off the GPU: it belongs to those that measure."""
    started, gpus = time.monotonic(), hardware.visible_gpus()
    settings = None
    if arguments.config:
        settings = read_settings(arguments.config, BenchmarkSettings)
        if settings.benchmark.gpus and not gpus:
            raise hardware.no_gpu(settings.benchmark.gpus)
        gpus = gpus[: settings.benchmark.gpus]
    if arguments.name == "trainer":
        rows, facts = trainer.measure(settings, arguments.plan, arguments.case, arguments.steps), {}
    elif arguments.name == "plans":
        rows, facts, gpus = plans.measure(settings, arguments.case, arguments.steps, arguments.once), {}, gpus[:1]
    else:
        settings = settings or default_settings(torch.device("cuda" if gpus else "cpu"))
        gpus = gpus[:1]
        compiles = settings.compile == "on" or (settings.compile == "auto" and bool(gpus))
        rows, facts = batch_size.measure(settings, gpus[0] if gpus else None, arguments.plan, compiles)
    write(arguments, gpus[0].name if gpus else hardware.cpu_name(), len(gpus), started, facts, rows)


def run_training(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of training.json."""
    conversations, pad_id = training.conversations_of(settings, arguments.conversations)
    plan = rows_of_the_plan(arguments)
    model = training_model(settings, device, arguments)
    steps, only = settings.benchmark.steps, arguments.case
    rows = training.measure(model, conversations, settings.sequence_length, steps, plan, compiles, pad_id, only)
    return rows, {"conversations": arguments.conversations or RANDOM_CONVERSATIONS}


def run_compile(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[list[dict], dict]:
    """Rows and facts of compile.json."""
    rows = compile.measure(settings, device, rows_of_the_plan(arguments), compiles, arguments.conversations)
    return rows, {"conversations": arguments.conversations or RANDOM_CONVERSATIONS}


def run_attention(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of attention.json; without settings, of the shape that `trainer` measures."""
    if not arguments.config and device.type == "cuda":
        settings = settings.model_copy(update={"model": Model(depth=12), "sequence_length": trainer.LENGTH})
    shape = GPTConfig.from_settings(settings.model, settings.vocab_size, settings.sequence_length)
    rows = rows_of_the_plan(arguments) or attention.ROWS[device.type]
    dtype = hardware.resolve_dtype(settings.dtype, device)
    measured = attention.measure(shape, rows, device, dtype, compiles, arguments.case)
    return measured, {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.width // shape.heads}


def run_float8(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of float8.json; without settings, of 20 layers as `trainer` measures them."""
    if not arguments.config and device.type == "cuda":
        changed = {"model": Model(depth=20), "sequence_length": trainer.LENGTH, "vocab_size": trainer.VOCAB_SIZE}
        settings = settings.model_copy(update=changed)
    shape = GPTConfig.from_settings(settings.model, settings.vocab_size, settings.sequence_length)
    rows = rows_of_the_plan(arguments) or (trainer.DEPTHS.get(shape.depth, 32) if device.type == "cuda" else 1)
    return float8.measure(shape, rows, device, arguments.case), {"depth": shape.depth, "width": shape.width}


def rows_of_the_plan(arguments: argparse.Namespace) -> int | None:
    """device_batch_size of the given plan."""
    if not arguments.plan:
        return None
    plan = read_json(arguments.plan).get("device_batch_size")
    if not isinstance(plan, int) or plan < 1:
        raise UserError(f"{arguments.plan}: device_batch_size = {plan}: must be 1 or more. Run its stage again.")
    return plan


def run_kv_cache(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of kv_cache.json."""
    known = (*kv_cache.CASES, *serving.FACTS)
    if unknown := next((case for case in arguments.case if case not in known), None):
        raise UserError(f"benchmark kv_cache: --case {unknown}: there is no such row; there are {', '.join(known)}.")
    own = settings.benchmark
    model = decoding_model(settings, device, arguments)
    reach = model.cos.size(0)
    if own.prompt_tokens + own.new_tokens > reach:
        raise UserError(
            f"benchmark.prompt_tokens + benchmark.new_tokens = {own.prompt_tokens + own.new_tokens}: "
            f"longer than the {reach} positions of the model."
        )
    generator = random.Random(settings.seed)
    prompts = [
        generator.choices(range(model.config.vocab_size), k=own.prompt_tokens) for _ in range(max(own.batch_sizes))
    ]
    rates = roofline.measure_rates(device, model.compute_dtype)
    facts = {
        "prompt_tokens": own.prompt_tokens,
        "new_tokens": own.new_tokens,
        "copy_bytes_per_second": rates.copy_bytes_per_second,
        "matmul_flops_per_second": rates.matmul_flops_per_second,
        "weight_bytes": roofline.weight_bytes(model),
    }
    lengths = own.prompt_tokens, own.new_tokens

    def rows() -> Iterator[dict]:
        """What matters most first: a run may be ended early."""
        reached = []
        for row in kv_cache.measure(model, own, prompts, rates, compiles, arguments.case):
            if row["case"] == "cache_graph" and row["tokens_per_second"]:
                reached.append(row["tokens_per_second"] / row["predicted_tokens_per_second"])
            yield row
        fraction = statistics.median(reached) if reached else 1.0  # on a CPU, or without that case, the roofline itself
        facts["projections"] = roofline.projections(model, own.batch_sizes, *lengths, fraction)
        if device.type == "cuda":
            facts.update(serving.measure(model, rates, settings.seed, arguments.case))
            yield from kv_cache.measure_peers(model, own, prompts, rates, arguments.case)

    facts["theory"] = roofline.operations(*lengths) | {
        "roofline_speedup": {
            size: operator.truediv(*roofline.generation_seconds(model, size, *lengths, rates))
            for size in own.batch_sizes
        }
    }
    return rows(), facts


def run_decode_tiles(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of decode_tiles.json."""
    own = settings.benchmark
    model = decoding_model(settings, device, arguments)
    if reason := unusable(model):
        raise UserError(f"benchmark decode_tiles: the decode step's kernels do not run here: {reason}.")
    sizes = [size for size in own.batch_sizes if not arguments.case or str(size) in arguments.case]
    filled = own.prompt_tokens + own.new_tokens // 2
    rates = roofline.measure_rates(device, model.compute_dtype)
    facts = {"filled_positions": filled, "copy_bytes_per_second": rates.copy_bytes_per_second}
    seconds = arguments.seconds or decode_tiles.SEARCH_SECONDS
    return decode_tiles.measure(model, sizes, filled, rates, seconds), facts


def run_first_token(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[list[dict], dict]:
    """Rows and facts of first_token.json."""
    model = decoding_model(settings, device, arguments)
    if arguments.tokenizer:
        tokenizer = Tokenizer.load(arguments.tokenizer)
        prompt = [tokenizer.bos_id, *tokenizer.encode(FIRST_TOKEN_PROMPT)]
    else:
        prompt = random.Random(settings.seed).choices(range(model.config.vocab_size), k=16)
    engine = Engine(model, rows=256, length=len(prompt) + 16)
    rows = first_token.measure(engine, prompt, FIRST_TOKEN_SAMPLES, settings.seed)
    say("benchmark first_token", ", ".join(f"{row['case']}: p = {row['p_value']:.3g}" for row in rows))
    return rows, {"prompt": FIRST_TOKEN_PROMPT if arguments.tokenizer else "random tokens"}


def run_ablation(
    settings: BenchmarkSettings, device: torch.device, compiles: bool, arguments: argparse.Namespace
) -> tuple[Iterable[dict], dict]:
    """Rows and facts of ablation.json."""
    if not (arguments.tokens and arguments.tokenizer):
        raise UserError("benchmark ablation: give --tokens and --tokenizer, the folders of those stages.")
    given = settings if arguments.config else None
    setup = ablation.Setup.of(arguments.tokens, arguments.tokenizer, given, device)
    seconds = arguments.seconds or ablation.SECONDS
    rows = ablation.measure(setup, device, arguments.case, seconds)
    return rows, {"tokens": arguments.tokens, "seconds_a_row": seconds}


def default_settings(device: torch.device) -> BenchmarkSettings:
    """The study's shape, 12 x 768 with 12 heads; on a CPU a tiny model that takes seconds."""
    common = {"seed": 1337, "dtype": "auto", "compile": "auto"}
    if device.type == "cuda":
        model, vocab_size, length, own = Model(depth=12, head_dim=64, additions=[]), 65_536, 512, Benchmark()
    else:
        model, vocab_size, length = Model(depth=4, head_dim=32, width=128, additions=[]), 4096, 256
        own = Benchmark(steps=5, batch_sizes=[1, 4, 16], new_tokens=50)
    return BenchmarkSettings(model=model, vocab_size=vocab_size, sequence_length=length, benchmark=own, **common)


def training_model(settings: BenchmarkSettings, device: torch.device, arguments: argparse.Namespace) -> GPT:
    """Float32 weights, products in the settings' dtype."""
    if arguments.model:
        model = load_model(arguments.model, device, sequence_length=settings.sequence_length)
    else:
        model = random_model(settings).to(device)
    model.compute_dtype = hardware.resolve_dtype(settings.dtype, device)
    return model


def decoding_model(settings: BenchmarkSettings, device: torch.device, arguments: argparse.Namespace) -> GPT:
    """Weights in the dtype of the products."""
    dtype = hardware.resolve_dtype(settings.dtype, device)
    if arguments.model:
        return load_model(arguments.model, device, dtype).eval()
    model = random_model(settings)
    model.compute_dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype)
        parameter.requires_grad_(False)
    return model.to(device).eval()


def compiler_fails(device: torch.device) -> str | None:
    """Why torch.compile does not work here, or None when it does."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sin())(torch.ones(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return None

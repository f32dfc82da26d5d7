"""A run folder made by hand: what a cluster with preemptions, a lost node and an out-of-memory leaves behind."""

import json
import math
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

START = 1_760_000_000.0
DEVICE = "NVIDIA A100-SXM4-80GB"


class Writer:
    """Writes a run; `clock` is the unix time that has come."""

    def __init__(self, results: Path, gpus: int = 4, seed: int = 0):
        self.results, self.gpus, self.clock = results, gpus, START
        self.random, self.jobs = random.Random(seed), 1000
        results.mkdir(parents=True, exist_ok=True)

    def json(self, name: str, content) -> None:
        path = self.results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def lines(self, name: str, contents) -> None:
        path = self.results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(content) + "\n" for content in contents)

    def job(self, rule, seconds, *, state="COMPLETED", gpus=0, cpus=8, wildcards=None, same=None, wait=20.0, **more):
        """One attempt, as three ledger lines; the clock is at its end afterwards. Returns the last line."""
        if same is None:
            self.jobs += 1
        record = {
            "rule": rule,
            "wildcards": wildcards or {},
            "job_id": str(self.jobs),
            "attempt": 1,
            "restart": 0 if same is None else same["restart"] + 1,
            "cluster": "slurm",
            "partition": "gpu" if gpus else "general",
            "nodes": 1,
            "node_names": f"artemis-{'gpu' if gpus else 'cpu'}{self.random.randint(1, 2)}",
            "cpus": cpus,
            "gpus": gpus,
            "gpu_type": "a100" if gpus else None,
            "submitted": self.clock if same is None else same["submitted"],
            "eligible": self.clock,
            "started": None,
            "ended": None,
            "state": "PENDING",
            "reason": None,
            "exit_code": None,
            "log": f"results/{rule}.log",
            **{key: value for key, value in more.items() if key in ("attempt",)},
        }
        self.lines("jobs/ledger.jsonl", [{**record, "event": "submitted"}])
        self.clock += wait
        record |= {"started": self.clock, "state": "RUNNING"}
        self.lines("jobs/ledger.jsonl", [{**record, "event": "started"}])
        if state == "RUNNING":
            return record
        self.clock += seconds
        record |= {"ended": self.clock, "state": state, "exit_code": 0 if state == "COMPLETED" else None, **more}
        self.lines("jobs/ledger.jsonl", [{**record, "event": "ended"}])
        return record

    def train(self, stage, first, last, *, started, startup, step_seconds, losses, total, every=50):
        """Log lines of steps first..last; returns the time at which the last one was done."""
        clock, lines, session = started + startup, [], {"attempt": None, "restart": self.random.random()}
        for step in range(first, last + 1):
            seconds = step_seconds * (8 if step == first else self.random.uniform(0.97, 1.03))
            clock += seconds
            start, end = losses
            loss = end + (start - end) * math.exp(-6 * step / total) + self.random.gauss(0, 0.03)
            line = {
                "step": step,
                "loss": loss,
                "seconds": seconds,
                "time": clock,
                "tokens_per_second": 524288 / seconds,
            }
            lines.append({**line, "val_bpb": None, **session})
            if step % every == 0 or step == total:
                lines[-1]["val_bpb"] = 0.30 * loss
                clock += 4 * step_seconds
            elif step % every == 1 and step > first:
                clock += 0.5  # a checkpoint
        self.lines(f"{stage}/log.jsonl", lines)
        return clock


def write_run(results: Path, gpus: int = 4) -> Writer:
    """A whole run: base was preempted, lost a node and went on; mid ran out of memory once; the report is running."""
    w = Writer(results, gpus)
    w.job("corpus", 95)
    w.job("tokenizer", 240)
    w.job("tokens", 310, cpus=16)
    for stage in ("mid", "sft"):
        w.job("conversations", 42, wildcards={"stage": stage})
    for stage in ("base", "mid", "sft"):
        w.job("batch_size_plan", 110, gpus=gpus, wildcards={"stage": stage}, wait=60)
    kill = {"gpus": gpus, "wait": 180}
    t = w.clock + 180
    end = w.train("base", 1, 150, started=t, startup=40, step_seconds=2, losses=(10.4, 2.8), total=600)
    one = w.job("base", end - t + 12, state="PREEMPTED", reason="preempted by job 992", **kill)
    t = w.clock + 130
    end = w.train("base", 151, 330, started=t, startup=35, step_seconds=2, losses=(10.4, 2.8), total=600)
    one = w.job(
        "base", end - t + 30, state="NODE_FAIL", reason="node artemis-gpu1 is down", same=one, gpus=gpus, wait=130
    )
    t = w.clock + 240
    end = w.train("base", 301, 600, started=t, startup=38, step_seconds=2, losses=(10.4, 2.8), total=600)
    w.job("base", end - t + 15, attempt=2, gpus=gpus, wait=240)
    w.job("mid", 48, state="FAILED", reason="CUDA out of memory", exit_code=86, gpus=gpus)
    for stage, losses, total in (("mid", (2.9, 1.6), 200), ("sft", (1.7, 1.1), 120)):
        t = w.clock + 30
        end = w.train(stage, 1, total, started=t, startup=30, step_seconds=1, losses=losses, total=total)
        w.job(stage, end - t + 8, attempt=2 if stage == "mid" else 1, gpus=gpus, wait=30)
    for stage in ("base", "mid", "sft"):
        w.job("evaluate_stage", 300, gpus=min(1, gpus), wildcards={"stage": stage})
    for name in ("training", "kv_cache", "first_token"):
        w.job("run_benchmark", 140, gpus=min(1, gpus), wildcards={"benchmark": name})
    w.job("report", 0, state="RUNNING")
    w.clock += 9
    _stage_files(w)
    return w


def _stage_files(w: Writer) -> None:
    device = DEVICE if w.gpus else "AMD EPYC 7742, 2 threads"
    about = {"device": device, "gpus": w.gpus, "torch": "2.11.0", "commit": "3f1c2ab"}
    for stage, steps, last, bpb, padding in (
        ("base", 600, 2.81, 0.843, None),
        ("mid", 200, 1.62, 0.871, 0.021),
        ("sft", 120, 1.13, 0.902, 0.034),
    ):
        metrics = {
            "steps": steps,
            "tokens": steps * 524288,
            "seconds": steps * 2.0,
            "tokens_per_second": 262144.123456789,
            "mfu": 0.4312345678 if w.gpus else None,
            "peak_memory_bytes": 61_234_567_890,
            "gpu_utilization": 0.953 if w.gpus else None,
            "loss_first": 10.41,
            "loss_last": last,
            "val_bpb": bpb,
            "padding_fraction": padding,
            "restarts": 2 if stage == "base" else 0,
            **about,
        }
        w.json(f"{stage}/metrics.json", metrics)
        w.json(f"{stage}/config.json", {"format": 1, "model": {"depth": 12, "width": 768}, "stage": stage})
        probes = [
            {
                "device_batch_size": size,
                "ok": size <= 48,
                "peak_bytes": int(6e9 + 1.25e9 * size) if size <= 48 else None,
                "tokens_per_second": 240_000 * size / (size + 3) if size <= 48 else None,
                "seconds": 14.0,
            }
            for size in (1, 2, 4, 8, 16, 32, 48, 64)
        ]
        w.json(
            f"batch_size/{stage}.json",
            {
                "device_batch_size": 32,
                "grad_accum_steps": 2,
                "tokens_per_step": 524288,
                "max_device_batch_size": 51,
                "capacity_bytes": 80_000_000_000,
                "peak_bytes": 46_000_000_000,
                "margin": 0.15,
                "probes": probes if stage != "sft" else [],
                "key": "ab" * 32,
                "seconds": 109.0,
                "reason": "219,429 tokens/s, the fastest of 16, 32 rows; 51 rows fit in memory",
                "source": "measured" if stage != "sft" else "cache",
            },
        )
        kind = 1 + ("base", "mid", "sft").index(stage)
        task = {"items": 500, "seconds": 41.0, "description": "Which of four goes on."}
        w.json(
            f"evaluate/{stage}.json",
            {
                "stage": stage,
                **about,
                "tasks": {
                    "bits_per_byte": {"score": bpb, "baseline": None, "items": 2_097_152, "seconds": 20.0},
                    "cloze": {"score": 0.31 + 0.02 * kind, "baseline": 0.25, "centred_score": 0.1, **task},
                    "multiple_choice": {
                        **{"score": 0.24 + 0.05 * kind, "interval": [0.201 + 0.05 * kind, 0.279 + 0.05 * kind]},
                        **{"baseline": 0.25, "centred_score": 0.05, **task},
                    },
                    "humaneval": {
                        **{"score": 0.0, "baseline": 0.0, "centred_score": 0.0, "items": 164, "seconds": 90.0},
                        "sandbox_without": ["files"] if stage == "sft" else [],
                    },
                },
                "samples": [
                    {
                        "prompt": "The state of our Union is",
                        "text": " strong, and | the *people* are\n\n# prosperous.\x1b[31m",
                    }
                ],
            },
        )
    save_file(
        {"wte": np.zeros((100, 8), np.float32), "head": np.zeros((100, 8), np.float32)},
        w.results / "sft/model.safetensors",
    )
    shapes = {"depth": 12, "sequence_length": 512, "vocab_size": 65536, "spread": 0.012}
    w.json(
        "benchmark/training.json",
        {
            "name": "training",
            **about,
            "command": "nanochat benchmark training",
            "rows": [
                {
                    "case": case,
                    "device_batch_size": size,
                    "compile": compiled,
                    "tokens_per_second": speed,
                    "real_tokens_per_second": real,
                    "mfu": speed / 1.3e6 if w.gpus else None,
                    "peak_memory_bytes": size * 1_000_000_000,
                    **shapes,
                }
                for case, size, compiled, speed, real in (
                    ("study", 4, False, 81_234.5678, 31_234.5678),
                    ("plan_batch_size", 32, False, 130_321.0, 50_107.0),
                    ("packed_rows", 32, False, 130_100.0, 126_200.0),
                    ("compile", 32, True, 189_000.0, 184_000.0),
                )
            ],
        },
    )
    sizes = [("curve", 2**i) for i in range(7)]
    w.json(
        "benchmark/batch_size.json",
        {
            "name": "batch_size",
            **about,
            "command": "nanochat benchmark batch-size",
            "choice": 32,
            "fastest": 64,
            "choice_over_fastest": 0.9976,
            "rows": [
                {
                    "case": case,
                    "device_batch_size": size,
                    "compile": compiled,
                    "tokens_per_second": (2 if compiled else 1) * 130_000 * size / (size + 3),
                    "forward_backward_tokens_per_second": (2 if compiled else 1) * 140_000 * size / (size + 3),
                    "mfu": 0.4 if w.gpus else None,
                    "peak_memory_bytes": (2 + size * (0.25 if compiled else 0.6)) * 1e9,
                    "gpu_utilization": 0.98 if w.gpus else None,
                    "used_fraction": 0.5 if w.gpus else None,
                    **shapes,
                }
                for compiled in (False, True)
                for case, size in (("base_default", 32), ("sft_default", 4), ("base_found", 32), *sizes)
            ],
        },
    )
    rows = [
        {
            "case": case,
            "batch_size": size,
            "tokens_per_second": one * size**power,
            "ms_per_step": 1000 * size / (one * size**power),
            "floor_fraction": 0.4 if w.gpus else None,
            "outputs_equal": True,
            "predicted_tokens_per_second": 1.3 * one * size**power,
        }
        for case, one, power in (
            ("recompute_eager", 60, 0.35),
            ("recompute_compiled", 150, 0.4),
            ("cache_eager", 45, 0.97),
            ("cache_graph", 2010, 0.9),
            ("transformers_static", 678, 0.93),
        )
        for size in (1, 4, 16, 32, 64, 93)
    ]
    nothing = dict.fromkeys(("tokens_per_second", "ms_per_step", "outputs_equal"))
    rows += [
        {"case": "vllm", "batch_size": None, "skipped": "skipped: vllm is not installed", **nothing},
        {"case": "transformers_dynamic", "batch_size": 93, "skipped": "not run: no time left", **nothing},
    ]
    facts = {
        "mixed": {"fraction": 0.912},
        "long_prompt": {"prompt_tokens": 2048, "seconds": 0.00183, "over_floor": 3.51},
        "capture": {"seconds": 4.9, "graphs": 32},
        "deep": {"depth": 20, "width": 1280, "tokens_per_second": 2534.2, "floor_fraction": 0.727},
    }
    content = {"name": "kv_cache", **about, "command": "nanochat benchmark kv_cache", **facts, "rows": rows}
    w.json("benchmark/kv_cache.json", content)
    rows = [
        {"case": "before", "samples": 4096, "distinct": 1, "chi2": 1.2e6, "p_value": 0.0},
        {"case": "after", "samples": 4096, "distinct": 412, "chi2": 398.2, "p_value": 0.66},
    ]
    w.json("benchmark/first_token.json", {"name": "first_token", **about, "command": "x", "rows": rows})
    w.json(
        "tokenizer/metrics.json",
        {
            "vocab_size": 65536,
            "bytes_per_token": {"presidents": {"nanochat": 4.8123, "gpt2": None, "gpt4": None}},
            "encode_bytes_per_second": 8.1e6,
            "train_seconds": 31.2,
            "train_bytes": 11_800_000,
            "missing": {"gpt2": "no vocab.bpe offline", "gpt4": "no cl100k_base.tiktoken offline"},
        },
    )
    shards = [
        {
            "file": f"{split}-00000.parquet",
            "split": split,
            "documents": n,
            "text_bytes": size,
            "size_bytes": size // 3,
            "sha256": "0",
        }
        for split, n, size in (("train", 244, 11_800_000), ("validation", 5, 400_000))
    ]
    w.json(
        "corpus/manifest.json",
        {
            "source": "bundled",
            "text_column": "text",
            "shards": shards,
            "provenance": {"files": [{"file": "sotu.parquet", "size_bytes": 3_100_000}]},
        },
    )
    w.json("tokens/metrics.json", {"train_tokens": 2_460_000, "validation_tokens": 83_000})
    for stage in ("mid", "sft"):
        w.json(f"conversations/{stage}/metrics.json", {"sources": {"chatterbot": 1200, "arithmetic": 800}})

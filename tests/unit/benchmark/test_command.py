import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmark import compile, kv_cache, peers, roofline, serving, trainer, training
from nanochat.benchmark.batch_size import _against_the_fastest
from nanochat.benchmark.command import compiler_fails, default_settings
from nanochat.benchmark.models import random_model
from nanochat.benchmark.timing import spread
from nanochat.cli import main
from nanochat.command_settings import BenchmarkSettings
from nanochat.config import Benchmark, Model
from nanochat.data.tokenizer import Tokenizer
from nanochat.files import sha256, write_json

TINY = BenchmarkSettings(
    seed=1,
    model=Model(depth=2, head_dim=8, width=32),
    vocab_size=256,
    sequence_length=64,
    dtype="float32",
    compile="off",
    benchmark=Benchmark(gpus=0, steps=2, batch_sizes=[1, 3], prompt_tokens=8, new_tokens=12),
)
HEADER = {"name", "device", "gpus", "torch", "commit", "command", "rows"}
COLUMNS = {
    "training": "case stage depth device_batch_size sequence_length vocab_size compile tokens_per_second "
    "real_tokens_per_second mfu peak_memory_bytes compile_seconds spread",
    "compile": "case stage depth device_batch_size sequence_length vocab_size compile tokens_per_second "
    "real_tokens_per_second mfu peak_memory_bytes compile_seconds spread",
    "batch_size": "case depth device_batch_size sequence_length vocab_size compile tokens_per_second real_tokens_per_second "
    "mfu peak_memory_bytes spread gpu_utilization used_bytes",
    "kv_cache": "case batch_size tokens_per_second ms_per_step floor_fraction outputs_equal predicted_tokens_per_second",
    "first_token": "case samples distinct chi2 p_value",
    "attention": "case batch_size sequence_length window ms spread flops_per_second",
    "float8": "case tokens outer inner bfloat16_ms float8_ms cast_ms gain_ms error",
}


@pytest.fixture(scope="module", autouse=True)
def short():
    """Three repetitions of everything."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, kv_cache):
            patch.setattr(module, "BUDGET_SECONDS", {"cpu": 0.0})
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory, short) -> dict[str, dict]:
    """The file of each benchmark, each run once."""
    return {name: measure(name, tmp_path_factory.mktemp(name)) for name in COLUMNS}


def measure(name: str, folder, *more: str) -> dict:
    (folder / "config.json").write_text(TINY.model_dump_json())
    assert main(["benchmark", name, "--config", str(folder / "config.json"), "--out", str(folder), *more]) == 0
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", COLUMNS)
def test_the_file_keeps_the_contract(name, written):
    content = written[name]
    assert content.keys() >= HEADER
    assert content["name"] == name
    for row in content["rows"]:
        assert row.keys() >= set(COLUMNS[name].split())


def test_a_row_names_the_kernels_that_ran(written):
    if not torch.cuda.is_available():
        assert {row["kernels"] for row in written["compile"]["rows"]} == {"none"}


def test_the_sweep_says_how_good_the_plan_is(tmp_path, capfd):
    plan = {"device_batch_size": 2, "tokens_per_step": 6 * 64, "gpus": 0}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "config.json").write_text(TINY.model_dump_json())
    where = ["--config", str(tmp_path / "config.json"), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path)]
    assert main(["benchmark", "batch-size", *where]) == 0
    assert "step 1/" not in capfd.readouterr().err  # a probe's steps are none of this run's
    content = json.loads((tmp_path / "batch_size.json").read_text())
    speeds = {row["device_batch_size"]: row["tokens_per_second"] for row in content["rows"] if row["case"] == "curve"}
    assert set(speeds) == {2, 3, 4, 6}
    del speeds[4]  # no divisor of six: no training would use it
    assert content["choice"] == 2
    assert content["fastest"] == max(speeds, key=speeds.get)
    assert 0.1 < content["choice_over_fastest"] < 10
    found = {row["case"]: row["device_batch_size"] for row in content["rows"] if row["case"] != "curve"}
    assert found == {"base_default": 6, "sft_default": 4, "base_found": 2}


@pytest.mark.parametrize(("gpus", "counts"), [(0, []), (1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8])])
def test_the_trainer_is_measured_on_doubling_numbers_of_gpus(gpus, counts):
    assert trainer._several(gpus) == counts


def test_the_choice_and_the_fastest_are_timed_again_in_turns():
    """Three of each, and the medians count: noise that made a size the fastest of the sweep is not held against the choice."""
    asked, again = [], {8: [990.0, 1000.0], 4: [1000.0, 970.0]}

    def rate(size):
        asked.append(size)
        return again[size].pop(0)

    assert _against_the_fastest(rate, {2: 500.0, 4: 980.0, 8: 1200.0}, choice=4, fastest=8) == 0.98
    assert asked == [8, 4, 8, 4]
    assert _against_the_fastest(rate, {8: 1200.0}, choice=8, fastest=8) == 1


def test_the_cache_gives_what_recomputation_gives(written):
    rows = written["kv_cache"]["rows"]
    assert [(row["case"], row["batch_size"]) for row in rows] == [
        (case, size) for size in (1, 3) for case in ("recompute_eager", "cache_eager")
    ]
    assert all(row["outputs_equal"] for row in rows)


def test_the_bug_is_told_from_the_engine(written):
    before, after = written["first_token"]["rows"]
    assert (before["case"], before["distinct"]) == ("before", 1)
    assert before["p_value"] < 1e-6 < 1e-3 < after["p_value"]
    assert after["distinct"] > 50


@pytest.mark.slow
def test_the_trainer_is_measured_as_it_runs(tmp_path):
    """In a process of its own: loader, update, log and a checkpoint, with the plan's rows."""
    (tmp_path / "plan.json").write_text('{"device_batch_size": 2, "grad_accum_steps": 3}')
    content = measure("trainer", tmp_path, "--plan", str(tmp_path / "plan.json"), "--steps", "4")
    assert content.keys() >= HEADER
    (row,) = content["rows"]
    assert (row["case"], row["gpus"], row["steps"]) == ("d2", 0, 3)  # one of four follows the checkpoint
    assert (row["device_batch_size"], row["grad_accum_steps"], row["tokens_per_step"]) == (2, 3, 2 * 3 * 64)
    assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["ms_per_step"] * 1000)
    assert 0 <= row["loader_fraction"] < 1
    assert row["checkpoint_write_seconds"] > 0
    assert row["compile_seconds"] is row["compile_warm_seconds"] is row["mfu"] is None


@pytest.mark.slow
def test_additions_are_held_against_the_plain_model(tmp_path):
    """The same text, the same start, the same time; every second row another seed."""
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save(tmp_path / "tokenizer")
    shards = []
    for split, tokens in (("train", 20_000), ("validation", 2_000)):
        path = tmp_path / "tokens" / f"{split}-00000.bin"
        path.parent.mkdir(exist_ok=True)
        (np.arange(tokens) * 7 % 251).astype("<u2").tofile(path)
        shard = {"file": path.name, "split": split, "tokens": tokens, "documents": 1, "text_bytes": tokens}
        shards.append(shard | {"size_bytes": path.stat().st_size, "sha256": sha256(path)})
    metrics = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "bos_id": 0, "tokenizer_sha256": ""}
    write_json(tmp_path / "tokens" / "metrics.json", metrics | {"shards": shards})
    where = ["--tokens", str(tmp_path / "tokens"), "--tokenizer", str(tmp_path / "tokenizer"), "--seconds", "0.5"]
    cases = ["plain", "value_embeddings+smear", "windows", "plain#2"]
    content = measure("ablation", tmp_path, *where, *[word for case in cases for word in ("--case", case)])
    assert content.keys() >= HEADER
    plain, added, windowed, again = content["rows"]
    assert [row["case"] for row in content["rows"]] == cases
    assert plain["parameters"] == again["parameters"] == windowed["parameters"] < added["parameters"]
    assert plain["val_bpb"] != again["val_bpb"]
    assert plain["val_bpb"] != windowed["val_bpb"]
    for row in content["rows"]:
        assert row["tokens"] == row["steps"] * 16 * TINY.sequence_length
        assert 0 < row["val_bpb"] < 8  # it learnt something of a text that repeats itself


def test_an_unknown_addition_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(TINY.model_dump_json())
    where = ["--config", str(tmp_path / "config.json"), "--out", str(tmp_path), "--case", "smeer"]
    assert main(["benchmark", "ablation", *where, "--tokens", "x", "--tokenizer", "y"]) == 2
    assert "smeer" in capsys.readouterr().err
    where[-1] = "plain+smear"
    assert main(["benchmark", "ablation", *where, "--tokens", "x", "--tokenizer", "y"]) == 2
    assert "no addition plain" in capsys.readouterr().err
    assert main(["benchmark", "ablation", *where]) == 2
    assert "--tokens" in capsys.readouterr().err


def test_a_case_that_there_is_none_of_is_named_and_nothing_written(tmp_path, capsys):
    (tmp_path / "config.json").write_text(TINY.model_dump_json())
    where = ["--config", str(tmp_path / "config.json"), "--out", str(tmp_path)]
    assert main(["benchmark", "trainer", *where, "--case", "d3"]) == 2
    assert "--case d3: there is no such row" in capsys.readouterr().err
    assert not (tmp_path / "trainer.json").exists()
    assert main(["benchmark", "kv-cache", *where, "--case", "cache_egaer"]) == 2
    assert "--case cache_egaer: there is no such row; there are recompute_eager, " in capsys.readouterr().err
    assert not (tmp_path / "kv_cache.json").exists()


def test_a_case_of_decoding_is_measured_alone(tmp_path):
    rows = measure("kv_cache", tmp_path, "--case", "cache_eager")["rows"]
    assert [(row["case"], row["batch_size"]) for row in rows] == [("cache_eager", 1), ("cache_eager", 3)]


@pytest.mark.slow
def test_a_plan_is_searched_three_times_and_trained_with(tmp_path):
    """Measured twice, then found in the cache; the trainer validates and saves on the way."""
    content = measure("plans", tmp_path)
    assert content.keys() >= HEADER
    (row,) = content["rows"]
    assert (row["case"], row["out_of_memory"], row["steps"]) == ("d2_t64", False, 4)
    assert row["seconds_cached"] < min(1.0, row["seconds_warm"] / 2, row["seconds_cold"] / 2)
    assert row["tokens_per_second"] > 0


def test_a_measurement_that_wants_a_gpu_says_so_in_one_line(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert main(["benchmark", "trainer", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_ranks_of_the_trainer_share_a_step(tmp_path):
    task = {"case": "d2", "model": TINY.model.resolved().model_dump(), "vocab_size": 256, "sequence_length": 64}
    task |= {"dtype": "float32", "compile": "off", "seed": 1, "rows": 2, "tokens_per_step": 512, "steps": 2, "gpus": 0}
    row = trainer.in_processes(task, None, ranks=2)
    assert row["grad_accum_steps"] == 2
    assert row["tokens_per_step"] == 512


def test_training_uses_the_size_of_the_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"device_batch_size": 16}')
    rows = measure("training", tmp_path, "--plan", str(tmp_path / "plan.json"))["rows"]
    assert [(row["stage"], row["case"], row["device_batch_size"], row["grad_accum_steps"]) for row in rows] == [
        ("base", "study", 8, 2),
        ("base", "loss_in_slices", 8, 2),
        ("base", "plan_batch_size", 16, 1),
        ("sft", "study", 4, 4),
        ("sft", "loss_in_slices", 4, 4),
        ("sft", "plan_batch_size", 16, 1),
        ("sft", "packed_rows", 16, 1),
    ]
    assert rows[0]["padding_fraction"] == 0
    assert rows[-1]["padding_fraction"] < rows[-2]["padding_fraction"]


def test_a_plan_without_a_size_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(TINY.model_dump_json())
    (tmp_path / "plan.json").write_text("{}")
    arguments = [
        "--config",
        str(tmp_path / "config.json"),
        "--plan",
        str(tmp_path / "plan.json"),
        "--out",
        str(tmp_path),
    ]
    assert main(["benchmark", "training", *arguments]) == 2
    assert "plan.json: device_batch_size = None" in capsys.readouterr().err


def test_a_wrong_token_is_found_and_placed():
    model = random_model(TINY)
    prompts = [[1, 2, 3], [4, 5, 6]]
    generated = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]), last_only=True)[0, -1].argmax()))
            generated.append(ids[3:])
    assert kv_cache.first_difference(model, prompts, generated) is None
    generated[1][4] = (generated[1][4] + 1) % 256
    found = kv_cache.first_difference(model, prompts, generated)
    assert (found["row"], found["position"]) == (1, 4)
    assert found["margin"] > 0


@pytest.mark.slow
def test_compiling_is_measured_by_processes_of_their_own():
    """The second finds in the compilers' caches what the first has left there."""
    if compiler_fails(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    task = {"device": "cpu", "settings": TINY.model_dump(mode="json"), "folder": None, "stage": "training"}
    eager, compiled = compile.before_and_after(task | {"rows": 2, "rows_per_step": 2, "kernels": []})
    assert (eager["case"], compiled["case"]) == ("eager", "compiled")
    assert 0 < compiled["compile_warm_seconds"] < compiled["compile_seconds"]


def test_the_cases_of_a_step_have_one_loss_and_gradient():
    """What is measured in different ways is the same work."""
    model = random_model(TINY)
    conversations = training.synthetic_conversations(256, 64, seed=0, count=40)
    text = training.Rows.of_one_text(conversations, 64)
    norms = {}
    for case in training.cases(model, conversations, text, plan=8, compile=False, pad_id=0):
        if case.stage == "base":
            step = training.TrainingStep(model, case)
            step()
            norms[case.name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for gradient in norms.values():
        torch.testing.assert_close(gradient, norms["study"], rtol=1e-3, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=40), st.booleans())
def test_rows_hold_every_token_and_no_loss_on_padding(lengths, packed):
    conversations = [np.arange(1, n + 1) for n in lengths]
    rows = training.Rows(conversations, sequence_length=64, packed=packed, pad_id=0)
    kept = sorted(rows.tokens[rows.real].tolist())
    assert kept == sorted(token for c in conversations for token in c[:65].tolist())
    inputs, targets = next(rows.batches(len(rows.tokens), torch.device("cpu")))
    assert torch.equal(targets >= 0, torch.from_numpy(rows.real[:, 1:]))
    assert inputs.shape == targets.shape == (len(rows.tokens), 64)


def test_the_roofline_counts_weights_once_and_keys_by_row():
    """By hand, for 2 layers of 32, 256 entries: N = 2 x 12 x 32^2 + 256 x 32; a position of keys and values is 2 x 2 x 32."""
    plain = TINY.model.model_copy(update={"additions": []})
    model = random_model(TINY.model_copy(update={"model": plain}))
    parameters = 2 * 12 * 32**2 + 256 * 32
    cost = roofline.cached_step(model, rows=3, filled=10)
    assert cost.bytes == 4 * (parameters + 3 * 10 * 2 * 2 * 32)
    assert cost.flops == 3 * (2 * parameters + 4 * 2 * 32 * 10)
    again = roofline.recomputed_step(model, rows=3, length=10)
    assert again.flops == 3 * (10 * 2 * (parameters - 256 * 32) + 2 * 256 * 32 + 4 * 2 * 32 * 50)


def test_spread_is_the_quartile_range_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([2.0]) == 0


def test_without_settings_a_gpu_gets_the_shape_of_the_study():
    settings = default_settings(torch.device("cuda"))
    model = settings.model.resolved()
    assert (model.depth, model.width, model.heads, settings.vocab_size) == (12, 768, 12, 65_536)
    assert default_settings(torch.device("cpu")).model.depth < 6


def test_the_study_s_ratio_is_one_of_operations():
    """29,900 tokens through the model without a cache, 250 with one: 119.6."""
    assert roofline.operations(50, 200)["ratio_of_operations"] == pytest.approx(119.6)


def test_projections_say_what_they_are_and_order_devices_by_bandwidth():
    model = random_model(TINY)
    rows = roofline.projections(model, [1], 8, 12, reached=0.5)
    assert all(row["projection"] for row in rows)
    speed = {row["device"]: row["projected_tokens_per_second"] for row in rows}
    assert speed["A100 80GB SXM"] > speed["RTX 4090"] > speed["V100 SXM2"] > speed["T4"] > 0
    assert rows[0]["roofline_tokens_per_second"] == pytest.approx(2 * rows[0]["projected_tokens_per_second"])


def test_a_case_that_used_up_its_time_marks_the_sizes_it_did_not_run(monkeypatch):
    monkeypatch.setattr(kv_cache, "CASE_SECONDS", -1.0)
    rates = roofline.Rates(1e9, 1e9)
    rows = list(kv_cache.measure(random_model(TINY), TINY.benchmark, [[1] * 8] * 3, rates, compile=False))
    assert [row["batch_size"] for row in rows] == [1, 3, 1, 3]
    assert all("not run" in row["skipped"] and row["tokens_per_second"] is None for row in rows)


def test_other_libraries_are_named_when_they_are_missing(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = peers.cases(random_model(TINY), 12)
    assert found["vllm"] == "skipped: vllm is not installed"
    assert tuple(found) == peers.CASES


def test_a_peer_has_as_many_parameters_as_the_model():
    model = random_model(TINY)
    shape = peers.llama_settings(model.config)
    width = shape["hidden_size"]
    block = 4 * width**2 + 3 * width * shape["intermediate_size"]
    assert shape["num_hidden_layers"] * block == pytest.approx(model.matmul_parameters() - model.head.numel(), rel=0.01)


def test_llama_cpp_reads_a_model_of_the_same_shape(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = random_model(TINY)
    tensors = gguf.GGUFReader(peers.write_gguf(tmp_path / "model.gguf", model.config)).tensors
    matrices = sum(
        int(tensor.n_elements) for tensor in tensors if tensor.name.startswith("blk") and len(tensor.shape) == 2
    )
    assert matrices == pytest.approx(model.matmul_parameters() - model.head.numel(), rel=0.01)
    assert {tuple(tensor.shape) for tensor in tensors if tensor.name in ("token_embd.weight", "output.weight")} == {
        (32, 256)
    }


def test_llama_cpp_decodes_several_rows():
    pytest.importorskip("gguf")
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: it is compiled for the machine it runs on"
    )
    run = peers.llama_cpp_case(random_model(TINY).config, torch.device("cpu"), new_tokens=4)
    alone, other = (run([prompt])[0] for prompt in ([5] * 8, [9] * 8))
    for _ in range(2):  # the second time in the context of the first
        assert run([[5] * 8, [9] * 8, [5] * 8]) == [alone, other, alone]
    assert len(alone) == 4


def test_mixed_lengths_long_prompts_and_captures_are_measured():
    model = random_model(TINY)
    found = serving.mixed(model, seed=0, requests=6, rows=2)
    assert found["fraction"] == pytest.approx(found["mixed_tokens_per_second"] / found["uniform_tokens_per_second"])
    prompt = serving.long_prompt(model, roofline.Rates(1e9, 1e9), seed=0)
    assert prompt["over_floor"] > 0
    assert min(prompt["products_seconds"], prompt["attention_seconds"]) > 0
    shares = [serving.seconds_of_libraries(model, tokens) for tokens in (16, 4096)]
    assert all(long > short > 0 for short, long in zip(*(share.values() for share in shares), strict=True))
    assert serving.capture_seconds(model, rows=2, length=16)["graphs"] == 0  # none on a CPU


@pytest.mark.slow
def test_compiled_recomputation_chooses_the_same_and_leaves_the_model_as_it_was():
    if reason := compiler_fails(torch.device("cpu")):
        pytest.skip(reason)
    model = random_model(TINY)
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    eager = [kv_cache.last_choice(model, tokens[:rows, :length]) for rows in (1, 2, 3) for length in (7, 12, 20)]
    with kv_cache.compiled_blocks(model):
        compiled = [kv_cache.last_choice(model, tokens[:rows, :length]) for rows in (1, 2, 3) for length in (7, 12, 20)]
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
    assert all(block._compiled_call_impl is None for block in model.blocks)

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmark import kv_cache, roofline, training
from nanochat.benchmark.command import default_settings, random_model
from nanochat.benchmark.timing import spread
from nanochat.cli import main
from nanochat.config import Benchmark, BenchmarkSettings, Model

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
    "training": "case depth device_batch_size sequence_length vocab_size compile tokens_per_second real_tokens_per_second "
    "mfu peak_memory_bytes spread",
    "kv_cache": "case batch_size tokens_per_second ms_per_step floor_fraction outputs_equal predicted_tokens_per_second",
    "first_token": "case samples distinct chi2 p_value",
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


def test_training_uses_the_size_of_the_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"device_batch_size": 8}')
    rows = measure("training", tmp_path, "--plan", str(tmp_path / "plan.json"))["rows"]
    assert [(row["case"], row["device_batch_size"], row["grad_accum_steps"]) for row in rows] == [
        ("eager_small_batch", 4, 2),
        ("plan_batch_size", 8, 1),
        ("packed_rows", 8, 1),
    ]
    assert rows[2]["padding_fraction"] < rows[0]["padding_fraction"]


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
    model = random_model(TINY)
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

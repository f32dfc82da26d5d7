"""A profile is read as Snakemake reads it; what it could not read, or passes over, is named."""

from pathlib import Path

import pytest
from snakemake_executor_plugin_submitit.profiles import load
from snakemake_executor_plugin_submitit.resources import Request


def test_a_profile_is_read_as_snakemake_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_ACCOUNT", "lab")
    (tmp_path / "config.yaml").write_text(
        "default-resources:\n  - slurm_partition=general\n  - runtime=60\n"
        "  - slurm_account=$MY_ACCOUNT\n"
        "set-resources:\n  base: {slurm_partition: gpu, gpu: 8, nodes: 2, runtime: 480}\nset-threads: {base: 16}\n"
    )
    request = load(tmp_path).requests["base"]
    assert (request.partition, request.gpus_per_node, request.runtime_minutes, request.cpus) == ("gpu", 4, 480, 16)
    assert request.account == "lab"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("set-resorces:\n  base: {gpu: 1}\n", "set-resorces: no such flag of Snakemake. Did you mean set-resources?"),
        ("jobs: [1\n", "not valid YAML"),
        ("- jobs\n", "must hold"),
    ],
)
def test_a_profile_that_snakemake_would_refuse_is_named(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml: .*" + words.split(".")[0]):
        load(tmp_path)


LISTS = """
default-resources: ["slurm_partition=general", "runtime=30"]
set-resources: ["base:runtime=60", "base:slurm_extra='--exclude=node7'"]
set-threads: ["base=4"]
"""

MAPPINGS = """
default-resources: {slurm_partition: general, runtime: 30}
set-resources: {base: {runtime: 60, slurm_extra: "'--exclude=node7'"}}
set-threads: {base: 4}
"""


@pytest.mark.parametrize("text", [LISTS, MAPPINGS])
def test_a_profile_may_hold_lists_or_mappings(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    requests = load(tmp_path).requests
    expected = Request(cpus=4, runtime_minutes=60, partition="general", exclude=("node7",))
    assert requests == {"(default)": Request(runtime_minutes=30, partition="general"), "base": expected}


@pytest.mark.parametrize(
    ("key", "value", "name", "read"),
    [
        ("runtime", "8h", "runtime_minutes", 480),
        ("runtime", "60 * attempt", "runtime_minutes", 60),
        ("mem", "256000", "memory_mb", 256_000),
        ("mem", "256GB", "memory_mb", 256_000),
        ("mem_mib", "1000", "memory_mb", 1048),
        ("mem_mb", "2 * input.size_mb", "memory_mb", None),  # known only with the job
        ("slurm_account", "$MY_ACCOUNT", "account", "lab"),
        ("slurm_account", "os.environ['MY_ACCOUNT']", "account", "os.environ['MY_ACCOUNT']"),  # no such name there
    ],
)
def test_values_are_those_that_snakemake_makes_of_them(tmp_path, monkeypatch, key, value, name, read):
    monkeypatch.setenv("MY_ACCOUNT", "lab")
    (tmp_path / "config.yaml").write_text(
        f"default-resources:\n  {key}: {value}\nset-resources:\n  base:\n    {key}: {value}\n"
    )
    requests = load(tmp_path).requests
    assert getattr(requests["base"], name) == getattr(requests["(default)"], name) == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "set-resources: {base: {runtime: soon}}",
            "set-resources: base: runtime: .*'soon' could not be parsed as minutes",
        ),
        ("set-resources: {base: {mem_mb: 256GB}}", "set-resources: base: mem_mb: must be a number; .* mem: 256GB"),
        ("set-resources: {base: {qos: $NO_SUCH}}", "qos = .NO_SUCH: the environment has no such variable"),
        ("resources: [downloads]", "resources: .downloads.: must be NAME=VALUE"),
        ("set-resources: {base: 8}", "Invalid set-resources format"),
        ("set-resources: [base]", "set-resources: .base.: must be RULE:NAME=VALUE"),
        ("set-threads: {base: many}", "set-threads: base = many: must be a whole number"),
    ],
)
def test_what_snakemake_could_not_read_is_named_with_file_and_key(tmp_path, monkeypatch, text, words):
    monkeypatch.delenv("NO_SUCH", raising=False)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"config.yaml: .*{words}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["all", "max", "int", "input"])
def test_a_partition_named_like_something_of_python_needs_two_pairs_of_quotes(tmp_path, name):
    """Snakemake evaluates a resource: the run would die in a traceback about a function."""
    for text in (f"default-resources: {{slurm_partition: {name}}}", f'default-resources: ["slurm_partition={name}"]'):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(
            ValueError, match=rf"config.yaml: default-resources: slurm_partition = {name}: .*\"'{name}'\""
        ):
            load(tmp_path)
    (tmp_path / "config.yaml").write_text(f"default-resources: {{slurm_partition: \"'{name}'\"}}")
    assert load(tmp_path).requests["(default)"].partition == name


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """A working directory with a workflow of three rules, one of which only collects."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "Snakefile").write_text(
        'include: "rules/benchmark.smk"\n\nif True:\n    rule base:\n        shell: "nanochat base"\n'
    )
    (tmp_path / "rules/benchmark.smk").write_text(
        'rule run_benchmark:\n    shell:\n        "nanochat benchmark"\n\n\nrule benchmark:\n    input:\n        "x",\n'
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("set-resources: {base: {walltime: 480}}", "set-resources: base: walltime: no such resource", "runtime"),
        ("default-resources: {slurm_parition: a100}", "default-resources: slurm_parition: no such", "slurm_partition"),
        ('set-resources: ["base:gpus=4"]', "set-resources: base: gpus: no such resource", "gpu"),
        ("set-resources: {benchmark: {runtime: 60}}", "set-resources: benchmark: runs no job itself", "run_benchmark"),
        ("set-threads: {bse: 1}", "set-threads: bse: no such rule", "base"),
    ],
)
def test_what_has_no_effect_is_told_with_what_may_be_meant(workflow, tmp_path, text, words, hint):
    (tmp_path / "config.yaml").write_text(text)
    ((what, change),) = load(tmp_path).without_effect
    assert what.startswith(f"{tmp_path}/config.yaml: {words}")
    assert change == f"did you mean {hint}?"


def test_what_has_an_effect_is_not_told(workflow, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "default-resources: {tmpdir: /scratch, mem: 4GB, disk_mb: 100, slurm_extra: --hold, downloads: 1}\n"
        "set-resources: {run_benchmark: {runtime: 1h, gres: gpu:1}}\nset-threads: {base: 4}\nresources: {downloads: 2}\n"
    )
    assert load(tmp_path).without_effect == []


def test_rules_are_not_guessed_where_the_text_does_not_tell_them(workflow, tmp_path):
    (tmp_path / "config.yaml").write_text("set-threads: {from_a_module: 1}")
    for more in ("module other:\n    snakefile: 'x'\n", "include: chosen\n"):
        (tmp_path / "Snakefile").write_text(more)
        assert load(tmp_path).without_effect == []


@pytest.mark.parametrize("name", ["artemis", "workstation", "local"])
def test_every_word_of_the_shipped_profiles_has_an_effect(monkeypatch, name):
    monkeypatch.chdir(Path(__file__).parents[3])
    assert load(Path("profiles") / name).without_effect == []


def test_threads_of_a_rule_without_resources_of_its_own_count(tmp_path):
    (tmp_path / "config.yaml").write_text("set-threads: {tokens: 32}\n")
    assert load(tmp_path).requests["tokens"].cpus == 32


def test_a_missing_profile_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such profile"):
        load(tmp_path / "none")


def test_a_profile_may_leave_the_number_of_gpus_to_the_rules(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "set-resources:\n  base: {slurm_partition: gpu, gpu_model: a100, runtime: 480}\n"
    )
    request = load(tmp_path).requests["base"]
    assert (request.gpus, request.gpu_model) == (1, "a100")

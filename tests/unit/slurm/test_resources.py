"""Snakemake's resources become sbatch parameters; contradictions are refused with rule, key, value and what would be right."""

import pytest
from snakemake.resources import Resource
from snakemake_executor_plugin_submitit.resources import ENVIRONMENT, gres_gpus, read, slurm_parameters
from submitit.slurm.slurm import _make_sbatch_string


def script(resources: dict, threads: int = 1) -> str:
    parameters = slurm_parameters(read("base", resources, threads), "base", ["PATH", "HOME"])
    return _make_sbatch_string(command="run", folder="/shared/%j", **parameters)


def test_every_word_reaches_sbatch():
    text = script(
        {
            "slurm_partition": "gpu",
            "slurm_account": "lab",
            "qos": "long",
            "constraint": "sxm4",
            "runtime": 480,
            "mem_mb": 256000,
            "gpu": 8,
            "gpu_model": "a100",
            "nodes": 2,
            "slurm_extra": "--exclude=node7 --mail-type END",
        },
        threads=16,
    )
    for flag in (
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--constraint=sxm4",
        "--time=480",
        "--mem=256000M",
        "--gpus-per-node=a100:4",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=16",
        "--exclude=node7",
        "--mail-type=END",
        "--requeue",
        "--signal=USR2@120",
        "--export=PATH,HOME",
    ):
        assert f"#SBATCH {flag}\n" in text
    assert "wckey" not in text
    assert "srun --unbuffered" in text
    assert "--cpus-per-task=16 " in text


def test_without_runtime_no_walltime_is_asked_for():
    assert "--time" not in script({})


def test_excluded_nodes_join_those_that_failed():
    request = read("base", {"slurm_extra": "--exclude=node[7-8,11] --hold"}, 1).without_nodes(["node9"])
    text = _make_sbatch_string(command="run", folder="/shared/%j", **slurm_parameters(request, "base", ["PATH"]))
    assert "#SBATCH --exclude='node[7-8,11],node9'\n" in text
    assert text.count("--exclude") == 1
    assert "#SBATCH --hold\n" in text


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("-x node7", "--exclude=node7"),
        ("-xnode7", "--exclude=node7"),
        ("-w node7", "--nodelist=node7"),
        ("-L matlab:2", "--licenses=matlab:2"),
        ("-d afterok:5", "--dependency=afterok:5"),
        ("-b now+1hour", "--begin=now+1hour"),
        ("-S 2", "--core-spec=2"),
        ("-s -x node7", "--oversubscribe"),
    ],
)
def test_short_flags_reach_sbatch_by_their_long_names(extra, line):
    assert f"#SBATCH {line}\n" in script({"slurm_extra": extra}).replace("'", "")


def test_a_job_without_gpus_asks_for_none():
    text = script({"runtime": 10})
    assert "gpu" not in text
    assert "gres" not in text


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"gpu": 3, "nodes": 2},
            "resources.gpu = 3 (train.base.gpus in config.yaml) does not divide by "
            "resources.nodes = 2 (train.base.nodes in config.yaml): 2 or 4 would",
        ),
        (
            {"gpu": 8, "nodes": 2, "gres": "gpu:a100:2"},
            "resources.gpu = 8 (train.base.gpus in config.yaml), but resources.gres = 'gpu:a100:2' on 2 node(s) asks for 4 GPUs: "
            "set train.base.gpus = 4, or a gres of 4 a node",
        ),
        ({"gpu": 0, "gres": "gpu:2"}, "on 1 node(s) asks for 2 GPUs: set train.base.gpus = 2, or no gres"),
        (
            {"gpu": 1, "gpu_model": "a100", "gres": "gpu:1"},
            "resources.gres = 'gpu:1' and resources.gpu_model = 'a100' both name GPUs: keep one",
        ),
        ({"gpu_model": "a100"}, "resources.gpu_model = 'a100' without resources.gpu: set train.base.gpus"),
        ({"runtime": 0}, "resources.runtime = 0: must be a whole number, at least 1"),
        ({"mem_mb": "lots"}, "resources.mem_mb = 'lots': must be a whole number"),
        ({"slurm_extra": "--time=5"}, "--time is not allowed: use resources.runtime"),
        ({"slurm_extra": "-p gpu"}, "-p is not allowed: use resources.slurm_partition"),
        ({"slurm_extra": "--no-requeue"}, "--no-requeue is not allowed: the plugin sets it itself"),
        ({"slurm_extra": "-W"}, "-W is not allowed: the plugin sets it itself"),
        ({"slurm_extra": "-M other"}, "-M is not allowed: jobs are followed on one cluster only"),
        ({"slurm_extra": "-pgpu"}, "-p is not allowed: use resources.slurm_partition"),
        ({"slurm_extra": "-Z 3"}, "sbatch has no -Z that a job could use; write --flag=value"),
        ({"slurm_extra": "-w"}, "-w has no value; write --nodelist=value"),
        ({"slurm_extra": "-x --hold"}, "-x has no value; write --exclude=value"),
        ({"slurm_extra": "-Hk"}, "-H takes no value: 'k'; write each flag apart, in full: --hold"),
        ({"slurm_extra": "-x ./nodes"}, "-x names a file, to which no failed node can be added"),
    ],
)
def test_contradictions_are_refused(resources, message):
    with pytest.raises(ValueError, match="rule base: ") as error:
        read("base", resources, 1)
    assert message in str(error.value)


@pytest.mark.parametrize("declared", [8, Resource("gpu", 8)])
def test_a_limit_that_clips_a_rules_gpus_is_refused(declared):
    with pytest.raises(
        ValueError, match=r"resources.gpu = 8 was clipped to 2 by the profile's global `resources: gpu`"
    ):
        read("another", {"gpu": 2}, 1, declared={"gpu": declared})


def test_a_rule_of_another_workflow_is_told_its_resource():
    with pytest.raises(
        ValueError, match=r"rule other: resources.gpu = 3 does not divide by resources.nodes = 2: 2 or 4"
    ):
        read("other", {"gpu": 3, "nodes": 2}, 1)


def test_what_a_rule_computes_for_each_job_is_no_contradiction():
    declared = {"gpu": Resource("gpu", lambda wildcards: 8), "nodes": Resource("", None)}
    assert read("base", {"gpu": 2}, 1, declared).gpus == 2


@pytest.mark.parametrize(("gres", "gpus"), [("gpu:a100:4", 4), ("gpu:2,lustre:1", 2), ("gpu", 1), ("lustre:1", 0)])
def test_gres_counts_gpus(gres, gpus):
    assert gres_gpus(gres) == gpus
    assert read("base", {"gres": gres, "nodes": 2}, 1).gpus == 2 * gpus


@pytest.mark.parametrize(
    ("resources", "asks", "not_"),
    [
        (
            {"gpu": 8, "nodes": 2, "gres": "gpu:a100:4"},
            "--gres=gpu:a100:4",
            "gpus-per-node",
        ),  # a workflow's rules say gpu too
        ({"gpu": 4, "gres": "lustre:1"}, "--gpus-per-node=4", "gpu:"),
    ],
)
def test_gpus_are_asked_for_once_by_gres_where_it_has_some(resources, asks, not_):
    assert read("base", resources, 1).gpus == resources["gpu"]
    text = script(resources)
    assert f"#SBATCH {asks}\n" in text
    assert f"#SBATCH --gres={resources['gres']}\n" in text
    assert not_ not in text


def test_no_secret_is_in_the_allow_list():
    assert not [name for name in ENVIRONMENT if "TOKEN" in name or "KEY" in name or "SECRET" in name or "PASS" in name]


def test_the_walltime_signal_leaves_room_in_a_short_job():
    assert "--signal=USR2@15\n" in script({"runtime": 1})

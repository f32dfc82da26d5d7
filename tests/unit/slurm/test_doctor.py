"""The doctor names what a cluster would refuse or never start, and what would be right."""

from dataclasses import replace

import pytest
from snakemake_executor_plugin_submitit.doctor import Cluster, examine, main, minutes, probe_folder
from snakemake_executor_plugin_submitit.resources import Request


@pytest.fixture
def cluster():
    return Cluster(
        config={
            "ClusterName": "artemis",
            "AccountingStorageTRES": "cpu,mem,gres/gpu",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageEnforce": "associations,limits,qos",
        },
        partitions={
            "gpu": {
                "PartitionName": "gpu",
                "State": "UP",
                "MaxTime": "08:00:00",
                "DefaultTime": "01:00:00",
                "MaxNodes": "2",
            },
            "general": {
                "PartitionName": "general",
                "State": "UP",
                "MaxTime": "2-00:00:00",
                "Default": "YES",
                "MaxCPUsPerNode": "24",
            },
            "old": {"PartitionName": "old", "State": "DOWN", "MaxTime": "UNLIMITED", "AllowAccounts": "staff"},
        },
        gres={"gpu": "gpu:a100:4", "general": "(null)", "old": "gpu:v100:2"},
        accounts={"lab"},
        qos={"normal", "short"},
        qos_walltime={"short": "00:10:00"},
        largest_node={"gpu": (64, 512_000), "general": (32, 128_000)},
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(partition="gpux"), "no such partition: there are gpu, general, old"),
        (
            Request(partition="gpu", runtime_minutes=600),
            "runtime = 600 min is over the 480 min of partition gpu: set runtime to 480",
        ),
        (Request(partition="gpu", gpus=8, runtime_minutes=5), "partition gpu has 4 a node: set train.base.gpus = 4 or"),
        (
            Request(partition="gpu", cpus=128, runtime_minutes=5),
            "threads = 128: partition gpu has 64 CPUs a node: set-threads: base=64",
        ),
        (
            Request(partition="general", cpus=32, runtime_minutes=5),
            "threads = 32: partition general has 24 CPUs a node: set-threads: base=24",
        ),
        (
            Request(partition="general", memory_mb=256_000, runtime_minutes=5),
            "mem_mb = 256000: partition general has 128000 MB a node: set mem_mb to 128000",
        ),
        (Request(partition="gpu", gpus=1, gpu_model="h100", runtime_minutes=5), "partition gpu has a100: use a100"),
        (Request(partition="general", gpus=1, runtime_minutes=5), "partition general has no GPUs"),
        (Request(partition="gpu", gpus=12, nodes=3, runtime_minutes=5), "partition gpu allows 2"),
        (Request(partition="old", runtime_minutes=5), "partition old is DOWN"),
        (Request(partition="old", account="lab", runtime_minutes=5), "partition old does not take lab: it takes staff"),
        (
            Request(partition="gpu", account="other", runtime_minutes=5),
            "slurm_account = other is not yours: yours: lab",
        ),
        (Request(partition="gpu", qos="long", runtime_minutes=5), "qos = long is not yours: yours: normal, short"),
        (Request(partition="gpu", qos="short", runtime_minutes=30), "qos short allows 10 min"),
    ],
)
def test_what_cannot_run_is_fatal(cluster, request_, words):
    fatal = [str(finding) for finding in examine(cluster, {"base": request_}) if finding.level == "fatal"]
    assert any(words in text for text in fatal), fatal


def test_what_can_run_is_not(cluster):
    requests = {
        "base": Request(
            partition="gpu", gpus=8, nodes=2, gpu_model="a100", runtime_minutes=480, account="lab", qos="normal"
        ),
        "report": Request(runtime_minutes=60),
    }
    assert [finding for finding in examine(cluster, requests) if finding.level == "fatal"] == []


@pytest.mark.parametrize(
    ("offered", "model"),
    [("gpu:2080ti:8,gpu:a100:4", "2080ti"), ("gpu:3090:8(S:0-1)", "3090"), ("gpu:8", "a100"), ("gpu:8(S:0-1)", "a100")],
)
def test_a_model_of_gpus_may_begin_with_a_digit(cluster, offered, model):
    cluster.gres["gpu"] = offered
    request = Request(partition="gpu", gpus=4, gpu_model=model, runtime_minutes=60)
    assert [finding for finding in examine(cluster, {"base": request}) if finding.level == "fatal"] == []


def test_of_gpus_named_by_digits_too_only_those_offered_are_taken(cluster):
    cluster.gres["gpu"] = "gpu:3090:8(S:0-1)"
    (fatal,) = examine(cluster, {"base": Request(partition="gpu", gpus=4, gpu_model="a100", runtime_minutes=60)})
    assert str(fatal) == "rule base: gpu_model = a100: partition gpu has 3090: use 3090"


def test_accounts_are_compared_as_slurm_does_whatever_their_case(cluster):
    cluster.partitions["gpu"]["AllowAccounts"] = "Lab,staff"
    requests = {"base": Request(partition="gpu", account="LAB", gpus=1, runtime_minutes=60)}
    assert [finding for finding in examine(cluster, requests) if finding.level == "fatal"] == []


@pytest.mark.parametrize(
    ("rule", "request_", "what", "change"),
    [
        ("base", Request(gpus=8), "gpu = 8 (train.base.gpus in config.yaml) on 1 node(s)", "or train.base.nodes = 2"),
        (
            "sft",
            Request(gpus=10),
            "train.sft.gpus in config.yaml",
            "set train.sft.gpus = 4 or fewer, or train.sft.nodes = 5",
        ),
        ("evaluate_stage", Request(gpus=8), "evaluate.gpus in config.yaml", "set evaluate.gpus = 4 or fewer"),
        ("other", Request(gpus=8), "rule other: gpu = 8 on 1 node(s)", "set gpu = 4 or fewer, or nodes = 2"),
        ("mid", Request(gpus=12, nodes=3), "nodes = 3 (train.mid.nodes in config.yaml)", "partition gpu allows 2"),
    ],
)
def test_gpus_and_nodes_are_told_by_the_setting_that_says_how_many(cluster, rule, request_, what, change):
    (fatal,) = examine(cluster, {rule: replace(request_, partition="gpu", runtime_minutes=60)})
    assert what in fatal.what
    assert fatal.change.endswith(change)


def test_each_of_several_partitions_is_looked_up(cluster):
    request = Request(partition="gpu,lnog,general", runtime_minutes=60)
    (fatal,) = [str(finding) for finding in examine(cluster, {"base": request}) if finding.level == "fatal"]
    assert fatal == (
        "rule base: slurm_partition = gpu,lnog,general: no such partition as 'lnog': there are gpu, general, old"
    )


def test_a_job_that_one_of_its_partitions_can_run_is_not_refused(cluster):
    request = Request(partition="general,gpu", runtime_minutes=600, account="lab")
    findings = examine(cluster, {"base": request})
    assert [finding.level for finding in findings if finding.level == "fatal"] == []
    assert any(
        finding.what.endswith("over the 480 min of partition gpu") and finding.change.endswith("runs on general only")
        for finding in findings
    )
    cluster.config["EnforcePartLimits"] = "ALL"  # then sbatch refuses it
    assert next(finding.level for finding in examine(cluster, {"base": request})) == "fatal"


def test_a_job_that_none_of_its_partitions_can_run_is_refused(cluster):
    findings = examine(cluster, {"base": Request(partition="gpu,general", cpus=128, runtime_minutes=5)})
    assert [finding.level for finding in findings].count("fatal") == 2


def test_preemption_is_told_of_each_partition(cluster):
    cluster.partitions["gpu"]["PreemptMode"] = "CANCEL"
    findings = examine(cluster, {"base": Request(partition="general,gpu", gpus=1, runtime_minutes=5)})
    assert any(finding.what == "partition gpu: PreemptMode=CANCEL" for finding in findings)


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ("gpu", None),  # it has a DefaultTime
        ("general", "has no default, so the job gets its longest, 2880 min"),
        ("old", "has no default, so the job gets no limit at all"),
    ],
)
def test_a_missing_runtime_is_told_where_the_site_has_no_default(cluster, partition, words):
    cluster.partitions["old"]["State"] = "UP"
    said = [
        str(finding)
        for finding in examine(cluster, {"base": Request(partition=partition)})
        if "no runtime" in finding.what
    ]
    assert bool(said) == bool(words)
    assert not words or words in said[0]


@pytest.mark.parametrize(
    ("rule", "minutes_", "told"), [("sft", 8, True), ("sft", 10, False), ("base", None, False), ("report", 8, False)]
)
def test_a_walltime_that_leaves_no_time_to_train_is_told(cluster, rule, minutes_, told):
    """`runtime: 8` was meant as hours."""
    findings = examine(cluster, {rule: Request(partition="gpu", gpus=1, runtime_minutes=minutes_)})
    assert [one.level for one in findings if "no time to train" in one.what] == ["warning"] * told


def test_a_cpu_stage_on_a_gpu_partition_is_pointed_out(cluster):
    (finding,) = examine(cluster, {"report": Request(partition="gpu", runtime_minutes=5)})
    assert (finding.level, finding.change) == ("warning", "use a CPU partition")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2-00:00:00", 2880),
        ("08:00:00", 480),
        ("30:00", 30),
        ("00:10:00", 10),
        ("UNLIMITED", None),
        ("1-12", 2160),
        ("90", 90),
    ],
)
def test_walltimes(text, value):
    assert minutes(text) == value


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("SBATCH_ACCOUNT", "SBATCH_ACCOUNT = elsewhere is not yours: yours: lab"),
        ("SBATCH_QOS", "SBATCH_QOS = elsewhere is not yours"),
        ("SBATCH_PARTITION", "SBATCH_PARTITION = elsewhere: no such partition"),
    ],
)
def test_what_sbatch_takes_from_the_environment_is_looked_at_too(cluster, monkeypatch, variable, words):
    monkeypatch.setenv(variable, "elsewhere")
    (found,) = [one for one in examine(cluster, {"base": Request(runtime_minutes=5)}) if one.level == "fatal"]
    assert words in str(found)
    said = Request(partition="gpu", account="lab", qos="normal", runtime_minutes=5, gpus=1)
    assert not [one for one in examine(cluster, {"base": said}) if one.level == "fatal"]


SRUN = """#!/bin/sh
for word; do case $word in --*) echo "$word" >> "$SRUN_OPTIONS"; shift;; *) break;; esac; done
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Puts a shell script in the place of a command of SLURM, which a machine of the unit tests has not."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SRUN_OPTIONS", str(tmp_path / "options"))
    (tmp_path / "bin").mkdir()

    def write(name: str, script: str):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)

    return write


def test_the_probe_of_the_folder_takes_what_sbatch_would_take(command, tmp_path, monkeypatch):
    command("srun", SRUN + '"$@"\n')
    for name in ("ACCOUNT", "PARTITION", "QOS"):
        monkeypatch.setenv(f"SBATCH_{name}", f"my-{name.lower()}")
    assert probe_folder(tmp_path, Request(partition="gpu")).level == "ok"
    options = (tmp_path / "options").read_text().split()
    assert {"--partition=gpu", "--account=my-account", "--qos=my-qos"} <= set(options)


@pytest.mark.parametrize(
    ("does", "level", "words"),
    [
        (
            "echo 'srun: error: Unable to allocate resources: Invalid account' >&2; exit 1",
            "warning",
            "not checked: srun was refused: srun: error: Unable to allocate resources: Invalid account",
        ),
        ("echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1", "warning", "free"),
        (
            "echo started; echo 'touch: Permission denied' >&2; echo 'srun: error: task 0: Exited' >&2; exit 1",
            "fatal",
            "a node could not write it (touch: Permission denied)",
        ),
        ("echo started", "fatal", "a node could not write it"),
    ],
)
def test_only_what_a_node_said_is_held_against_the_folder(command, tmp_path, does, level, words):
    command("srun", SRUN + does)
    finding = probe_folder(tmp_path, Request())
    assert finding.level == level
    assert words in str(finding)


def test_hidden_partitions_are_known(command):
    command(
        "scontrol",
        """#!/bin/sh
case "$*" in
  *"show config"*) echo "ClusterName = artemis";;
  *--all*"show partition"*) echo "PartitionName=open State=UP"; echo "PartitionName=a100 State=UP MaxTime=1:00:00";;
  *"show partition"*) echo "PartitionName=open State=UP";;
esac
""",
    )
    command("sinfo", '#!/bin/sh\ncase "$*" in *--all*) echo "a100|gpu:a100:4|64|512000";; esac\n')
    cluster = Cluster.ask()
    assert list(cluster.partitions) == ["open", "a100"]
    assert cluster.gres == {"a100": "gpu:a100:4"}


def test_misspelt_words_of_a_profile_are_warned_of(command, tmp_path, capsys):
    command(
        "scontrol",
        '#!/bin/sh\ncase "$*" in *config*) echo "ClusterName = a";; *) echo "PartitionName=gpu State=UP Default=YES";; esac\n',
    )
    (tmp_path / "config.yaml").write_text("default-resources: {walltime: 480}")
    assert main(["--profile", str(tmp_path), "--folder", str(tmp_path / "results"), "--no-job"]) == 0
    said = capsys.readouterr().out
    assert (
        "config.yaml: default-resources: walltime: no such resource; this has no effect: did you mean runtime?" in said
    )

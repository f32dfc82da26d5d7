"""Snakemake's resources -> a `Request` -> submitit's parameters. What contradicts itself is refused before submission.

The words are those of Snakemake's stock slurm executor, where it has one:

    runtime            minutes; without it the job gets the site's default
    mem_mb             MB on each node
    threads            CPUs of the job's one task on each node (Snakemake's own keyword)
    gpu, gpu_model     GPUs of the whole job, and which
    nodes              a multiple-node job starts once; `nanochat-launch` spreads it
    slurm_partition, slurm_account, qos, constraint
    gres               of each node, for sites that name their GPUs oddly or refuse --gpus-per-node: "gpu:a100:4"; GPUs in it are
                       asked for in place of gpu, which then must be as many or missing
    slurm_extra        further sbatch flags, e.g. "--exclude=node7 --mail-type=END"
"""

import shlex
from dataclasses import dataclass, field, replace

SIGNAL_SECONDS = (
    120  # before the walltime, less for a short one; SLURM may signal up to 60 s early, and a save must fit
)

LEAST_MEMORY_MB = 300  # what submitit and the inner Snakemake need themselves before the rule's command has started

# Names only: SLURM keeps whole environments in its database, so a job gets what it needs to run and nothing else.
ENVIRONMENT = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LC_ALL",
    "TERM",
    "TMPDIR",
    "PYTHONPATH",
    "PYTHONNOUSERSITE",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "MODULEPATH",
    "MODULESHOME",
    "LMOD_CMD",
    "LMOD_DIR",
    "BASH_ENV",
    "CONDA_PREFIX",
    "CONDA_EXE",
    "CONDA_DEFAULT_ENV",
    "SLURM_CONF",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_HOME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "GLOO_SOCKET_IFNAME",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "SOURCE_DATE_EPOCH",
]

ONE_CLUSTER = "jobs are followed on one cluster only; run snakemake on a login node of the one that shall train"

OWNED = {
    "--account": "slurm_account",
    "--constraint": "constraint",
    "--cpus-per-task": "threads",
    "--gpus": "gpu",
    "--gpus-per-node": "gpu",
    "--gpus-per-task": "gpu",
    "--gres": "gres",
    "--mem": "mem_mb",
    "--mem-per-cpu": "mem_mb",
    "--nodes": "nodes",
    "--partition": "slurm_partition",
    "--qos": "qos",
    "--time": "runtime",
    **dict.fromkeys(
        [
            "--array",
            "--chdir",
            "--comment",
            "--error",
            "--export",
            "--job-name",
            "--no-requeue",
            "--ntasks",
            "--ntasks-per-node",
            "--open-mode",
            "--output",
            "--parsable",
            "--quiet",
            "--requeue",
            "--signal",
            "--test-only",
            "--wait",
            "--wrap",
        ]
    ),
}
# Every short option of sbatch; in a script only the long names can be told from each other.
SHORT = {
    "-A": "--account",
    "-B": "--extra-node-info",
    "-C": "--constraint",
    "-D": "--chdir",
    "-F": "--nodefile",
    "-G": "--gpus",
    "-J": "--job-name",
    "-L": "--licenses",
    "-M": "--clusters",
    "-N": "--nodes",
    "-S": "--core-spec",
    "-a": "--array",
    "-b": "--begin",
    "-c": "--cpus-per-task",
    "-d": "--dependency",
    "-e": "--error",
    "-i": "--input",
    "-m": "--distribution",
    "-n": "--ntasks",
    "-o": "--output",
    "-p": "--partition",
    "-q": "--qos",
    "-t": "--time",
    "-w": "--nodelist",
    "-x": "--exclude",
}
SHORT_WITHOUT_VALUE = {
    "-H": "--hold",
    "-O": "--overcommit",
    "-Q": "--quiet",
    "-W": "--wait",
    "-k": "--no-kill",
    "-s": "--oversubscribe",
    "-v": "--verbose",
}


# The words above, and what else users call them.
KEYS = {
    "runtime",
    "mem_mb",
    "gpu",
    "gpu_model",
    "nodes",
    "slurm_partition",
    "slurm_account",
    "qos",
    "constraint",
    "gres",
    "slurm_extra",
}
OTHER_WORDS = {
    "walltime": "runtime",
    "time": "runtime",
    "memory": "mem",
    "mem_gb": "mem",
    "partition": "slurm_partition",
    "queue": "slurm_partition",
    "account": "slurm_account",
    "gpus": "gpu",
    "gpu_type": "gpu_model",
    "threads": "set-threads",
    "cpus": "set-threads",
    "cpus_per_task": "set-threads",
}

# Where the users of this project's workflow say how many: a setting of config.yaml, from which the rule takes its resource.
SETTINGS = {
    **{(stage, "gpu"): f"train.{stage}.gpus" for stage in ("base", "mid", "sft")},
    **{(stage, "nodes"): f"train.{stage}.nodes" for stage in ("base", "mid", "sft")},
    ("batch_size_plan", "gpu"): "train.<stage>.gpus",
    ("evaluate_stage", "gpu"): "evaluate.gpus",
    ("run_benchmark", "gpu"): "benchmark.gpus",
}


def to_change(rule: str, key: str) -> str:
    """What a user sets to give a rule another number: a setting, or the resource itself where the rule is not of the workflow."""
    return SETTINGS.get((rule, key), key)


def trains(rule: str) -> bool:
    """Whether it is a rule of this project's workflow that trains: those alone have a setting for nodes."""
    return (rule, "nodes") in SETTINGS


def spreads(rule: str) -> bool:
    """Whether more nodes would help: of the workflow's rules with GPUs only those that train."""
    return trains(rule) or (rule, "gpu") not in SETTINGS


def said(rule: str, key: str, value: int) -> str:
    """ "gpu = 8 (train.base.gpus in config.yaml)": a resource, and where it stands if that is known."""
    setting = SETTINGS.get((rule, key))
    return f"{key} = {value}" + (f" ({setting} in config.yaml)" if setting else "")


@dataclass(frozen=True)
class Request:
    """What one job asks for. `gpus` counts the whole job, `memory_mb` each node; `runtime_minutes` None is the site's default."""

    cpus: int = 1
    memory_mb: int | None = None
    runtime_minutes: int | None = None
    gpus: int = 0
    gpu_model: str | None = None
    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: tuple[str, ...] = ()
    extra: dict = field(default_factory=dict)

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    def without_nodes(self, nodes: list[str]) -> "Request":
        """The same, away from `nodes` (those that failed)."""
        return replace(self, exclude=tuple(dict.fromkeys([*self.exclude, *nodes])))

    def with_memory(self, factor: float) -> "Request":
        return replace(self, memory_mb=int((self.memory_mb or 2000) * factor))


def read(rule: str, resources: dict, threads: int, declared: dict | None = None) -> Request:
    """The request of a job. Raises ValueError naming rule, key, value and what would be right.

    `declared` is what the rule itself says, before a profile's limits: a global `resources: gpu=2` clips a rule's 8 without a
    word, and that is refused too.
    """

    def number(key: str, least: int, default: int | None) -> int | None:
        value = resources.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not str(value).lstrip("-").isdigit() or int(value) < least:
            raise ValueError(f"rule {rule}: resources.{key} = {value!r}: must be a whole number, at least {least}")
        return int(value)

    def word(key: str) -> str | None:
        value = resources.get(key)
        return str(value) if value not in (None, "") else None

    for key in ("gpu", "nodes"):
        asked = (declared or {}).get(key)
        if hasattr(asked, "is_evaluable"):  # a Resource of Snakemake's
            asked = None if asked.is_evaluable() else asked.value
        if isinstance(asked, int) and isinstance(resources.get(key), int) and asked > resources[key]:
            raise ValueError(
                f"rule {rule}: resources.{said(rule, key, asked)} was clipped to {resources[key]} by the profile's global "
                f"`resources: {key}`. Remove that limit, or set {to_change(rule, key)} = {resources[key]}"
            )
    nodes, gpus, gres, model = number("nodes", 1, 1), number("gpu", 0, 0), word("gres"), word("gpu_model")
    in_gres = gres_gpus(gres) * nodes if gres else 0
    if in_gres and "gpu" in resources and gpus != in_gres:
        instead = f"a gres of {gpus // nodes} a node" if gpus and gpus % nodes == 0 else "no gres"
        raise ValueError(
            f"rule {rule}: resources.{said(rule, 'gpu', gpus)}, but resources.gres = {gres!r} on {nodes} node(s) asks for "
            f"{in_gres} GPUs: set {to_change(rule, 'gpu')} = {in_gres}, or {instead}"
        )
    if in_gres and model:
        raise ValueError(
            f"rule {rule}: resources.gres = {gres!r} and resources.gpu_model = {model!r} both name GPUs: keep one"
        )
    if gpus == 0 and "gpu" in resources:
        model = None  # a profile names the model for a stage, its settings may still say: no GPU
    if model and not gpus:
        raise ValueError(
            f"rule {rule}: resources.gpu_model = {model!r} without resources.gpu: set {to_change(rule, 'gpu')}"
        )
    gpus = in_gres or gpus
    if gpus % nodes:
        raise ValueError(
            f"rule {rule}: resources.{said(rule, 'gpu', gpus)} does not divide by resources.{said(rule, 'nodes', nodes)}: "
            f"{gpus // nodes * nodes or nodes} or {(gpus // nodes + 1) * nodes} would"
        )
    memory = number("mem_mb", 1, None)
    extra = extra_flags(rule, word("slurm_extra") or "")
    exclude = extra.pop("exclude", None)  # kept apart: nodes that fail are added to it
    return Request(
        cpus=max(1, threads),
        memory_mb=memory and max(memory, LEAST_MEMORY_MB),
        runtime_minutes=number("runtime", 1, None),
        gpus=gpus,
        gpu_model=model,
        nodes=nodes,
        partition=word("slurm_partition"),
        account=word("slurm_account"),
        qos=word("qos"),
        constraint=word("constraint"),
        gres=gres,
        exclude=(str(exclude),) if exclude else (),
        extra=extra,
    )


def gres_gpus(gres: str) -> int:
    """GPUs per node of a gres string: "gpu:a100:4,lustre:1" -> 4."""
    total = 0
    for item in gres.split(","):
        name, *rest = item.split(":")
        if name in ("gpu", "gres/gpu"):
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def extra_flags(rule: str, text: str) -> dict[str, str | bool]:
    """`slurm_extra` as {long flag: value}. Raises ValueError on a flag that the plugin sets itself or cannot pass on."""
    said = f"rule {rule}: resources.slurm_extra = {text!r}"
    flags: dict[str, str | bool] = {}
    words = shlex.split(text)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            raise ValueError(f"{said}: {word!r} is not a flag; write --flag=value")
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            long = flag
        else:  # -x node7, -xnode7
            flag, value = word[:2], word[2:].removeprefix("=")
            has_value = len(word) > 2
            long = SHORT.get(flag) or SHORT_WITHOUT_VALUE.get(flag, "")
        if not long:
            raise ValueError(f"{said}: sbatch has no {flag} that a job could use; write --flag=value")
        if long == "--clusters":
            raise ValueError(f"{said}: {flag} is not allowed: {ONE_CLUSTER}")
        if long in OWNED:
            instead = f"use resources.{OWNED[long]}" if OWNED[long] else "the plugin sets it itself"
            raise ValueError(f"{said}: {flag} is not allowed: {instead}")
        if not has_value and flag not in SHORT_WITHOUT_VALUE and words and not words[0].startswith("-"):
            value, has_value = words.pop(0), True
        if not value and (flag in SHORT or long == "--exclude"):
            raise ValueError(f"{said}: {flag} has no value; write {long}=value")
        if value and flag in SHORT_WITHOUT_VALUE:
            raise ValueError(f"{said}: {flag} takes no value: {value!r}; write each flag apart, in full: {long}")
        if long == "--exclude" and "/" in value:
            raise ValueError(
                f"{said}: {flag} names a file, to which no failed node can be added; write --exclude=node7,node8"
            )
        flags[long.removeprefix("--")] = value if has_value else True
    return flags


def slurm_parameters(request: Request, name: str, environment: list[str]) -> dict:
    """Parameters for submitit's SlurmExecutor; `environment`: names of the variables that the job gets to see."""
    task = [f"--cpus-per-task={request.cpus}"]  # since 22.05 srun does not inherit it
    extra: dict = {"requeue": True, "export": ",".join(environment), **request.extra}
    if request.gpus and not gres_gpus(request.gres or ""):
        count = request.gpus_per_node
        extra["gpus-per-node"] = f"{request.gpu_model}:{count}" if request.gpu_model else str(count)
    if request.memory_mb:
        extra["mem"] = f"{request.memory_mb}M"
    known = {
        "job_name": name,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "gres": request.gres,
        "exclude": ",".join(request.exclude) or None,
        "nodes": request.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": request.cpus,
        "signal_delay_s": min(SIGNAL_SECONDS, 15 * (request.runtime_minutes or SIGNAL_SECONDS)),
        # What the job's own srun calls see must not be what sbatch was told.
        "setup": ["export SLURM_EXPORT_ENV=ALL"],
        "srun_args": task,
        "additional_parameters": extra,
    }
    # Left to itself submitit names a wckey, which not every site takes, and a walltime of 5 minutes.
    unless_told = {"time": request.runtime_minutes, "wckey": None}
    return {key: value for key, value in known.items() if value is not None} | unless_told

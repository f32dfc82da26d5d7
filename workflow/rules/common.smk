"""Settings are checked and cut into one file a stage before any job is queued; see nanochat/config.py for each of them."""

import os
import sys
from pathlib import Path

from nanochat.check import check
from nanochat.config import TRAINED_STAGES
from nanochat.config_files import load, write_run_settings, write_stage_settings
from nanochat.data.text_files import expand as expand_paths
from nanochat.errors import UserError
from snakemake_executor_plugin_submitit.ledger import has_open_jobs
from snakemake_executor_plugin_submitit.stale_lock import (
    is_locked,
    record_holder,
    remove_stale_lock,
)

# The commands of this environment come first, whether it is activated or not.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))

# Snakemake lists config.yaml last although everything else overlays it.
files = sorted(workflow.configfiles, key=lambda path: str(path) != "config.yaml")

# `workflow.dryrun` is known only after this file has been read.
dry_run = bool(workflow.output_settings and workflow.output_settings.dryrun)

# What the Hugging Face hub and the trackers want to know, where it is set. Secrets among it: a job gets them through its
# private folder, not in its environment, which SLURM may keep.
workflow.register_envvars(*(name for name in os.environ if name == "HF_TOKEN" or name.startswith("WANDB_")))

try:
    run = load(config, files)
    # Jobs find the files that the driver wrote; they neither check the corpus again nor touch the files.
    if workflow.is_main_process:
        check(run, files)
        if not dry_run:
            killed = remove_stale_lock()
            if killed:
                logger.info(f"The driver with process id {killed} was killed; its lock is removed.")
        # A job that is queued again reads its settings anew, and those of another training would start it from nothing. So
        # they stay while another driver works here, and in a dry run while jobs of a dead one go on, which a real one takes over.
        in_use = is_locked(run.results) or (dry_run and has_open_jobs(f"{run.results}/jobs"))
        kept = write_stage_settings(run, f"{run.results}/config", in_use, dry_run)
        if kept:
            logger.warning(
                f"A run of {run.results} goes on with other settings of {', '.join(kept)}: they stay as they are until it ends."
            )
        if not dry_run:
            workflow.config_settings.configfiles = [write_run_settings(run, f"{run.results}/config")]
except UserError as error:
    # A WorkflowError would wrap the message in places of this file.
    logger.error(str(error))
    sys.exit(2)


def own_texts(wildcards):
    """The user's text files: one that is new, gone or changed makes the corpus anew."""
    own = run.corpus.source == "directory"
    return nameable(expand_paths(run.corpus.paths, "corpus.paths") if own else [])


def own_conversations(wildcards):
    """The user's conversation files of a stage."""
    mixture = getattr(run.train, wildcards.stage).mixture
    return nameable(source.path for source in mixture if source.path)


def nameable(paths):
    """Without those that Snakemake would take for patterns: it has no way to quote a brace."""
    return [str(path) for path in paths if not {"{", "}"} & set(str(path))]


def threads_of(stage):
    """CPUs of a training job on each of its nodes: 16 a GPU."""
    return 16 * max(1, stage.gpus // stage.nodes)


wildcard_constraints:
    stage="|".join(TRAINED_STAGES),
    benchmark="[a-z_]+",


onstart:
    record_holder()

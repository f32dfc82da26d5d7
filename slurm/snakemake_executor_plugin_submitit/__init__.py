"""Snakemake executor plugin on top of submitit: where a job runs, and what becomes of it.

`Executor` submits each job through submitit, to this machine or to SLURM, looks at all of them together, writes the ledger,
and decides what follows a failure. It is imported at every start of Snakemake and of every job, so imports stay light here,
and `from __future__ import annotations` and `X | None` stay out of `ExecutorSettings`: Snakemake calls its fields' types.
"""

import asyncio
import difflib
import os
import shlex
import sys
import time
from dataclasses import dataclass, field, replace

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings, ExecutorSettingsBase

FULL_SECONDS = 60


@dataclass
class ExecutorSettings(ExecutorSettingsBase):
    cluster: str = field(
        default="local",
        metadata={
            "help": "Where jobs run: `local` is this machine, `slurm` the cluster that sbatch submits to. Never guessed.",
            "choices": ["local", "slurm"],
        },
    )
    folder: str = field(
        default="",
        metadata={
            "help": "Folder for the jobs' own files; on a cluster it must be shared by all nodes. Default: jobs/ in the "
            "workflow's results (its pathvar `results`)."
        },
    )
    ledger: str = field(
        default="",
        metadata={"help": "File that records every attempt of every job. Default: ledger.jsonl in the folder."},
    )
    poll_seconds: float = field(
        default=0.0,
        metadata={"help": "Seconds between looks at the jobs. Default 0: 0.25 locally, 10 on a cluster."},
    )
    progress: str = field(
        default="on",
        metadata={"help": "Relay the newest line of each running job's log.", "choices": ["on", "off"]},
    )
    grace_seconds: float = field(
        default=10.0,
        metadata={"help": "Local jobs: seconds between the request to stop and the kill, for a trainer to save."},
    )
    gpus: str = field(
        default="all",
        metadata={"help": "Local jobs: GPUs to share out, e.g. `0,1`. Default: `all` that CUDA_VISIBLE_DEVICES shows."},
    )
    doctor: str = field(
        default="on",
        metadata={"help": "Check partition, account and limits before the first submission.", "choices": ["on", "off"]},
    )


common_settings = CommonSettings(
    non_local_exec=True,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    pass_default_storage_provider_args=True,
    pass_default_resources_args=True,
    # Values on a command line end up in logs and in SLURM's database: they travel in the job's private folder.
    pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False,
    init_seconds_before_status_checks=0,
)


class Executor(RemoteExecutor):
    def __init__(self, workflow, logger):
        # The base class starts the polling thread before __post_init__: what that thread touches exists from here on.
        self.ready = False
        self.driver = None
        self._complaint = ""
        super().__init__(workflow, logger)

    def __post_init__(self):
        from .driver import Driver

        settings = self.workflow.executor_settings or ExecutorSettings()
        folder = settings.folder or f"{self.workflow.pathvars.get('results')}/jobs"
        settings = replace(settings, folder=folder)
        try:
            self.driver = Driver(settings, self.logger, dict(self.envvars()), self.workflow.resource_settings.cores)
            self.driver.check(list(self.workflow.dag.needrun_jobs()))
            self._warn_of_unknown_rules()
            self._warn_of_unknown_resources()
        except ValueError as error:
            self.wait = False  # ends the polling thread; nothing was submitted
            raise WorkflowError(str(error)) from error
        self.next_seconds_between_status_checks = self.driver.poll_seconds
        self.ready = True

    def _warn_of_unknown_rules(self):
        """Snakemake passes over a rule that does not exist in set-resources and set-threads."""
        rules = [rule.name for rule in self.workflow.rules]
        settings = self.workflow.resource_settings
        for key, values in (
            ("set-resources", settings.overwrite_resources),
            ("set-threads", settings.overwrite_threads),
        ):
            for name in sorted(set(values) - set(rules)):
                similar = difflib.get_close_matches(name, rules, n=1)
                hint = f" Did you mean {similar[0]}?" if similar else ""
                self.logger.warning(f"{key}: {name}: no such rule; this has no effect.{hint}")

    def _warn_of_unknown_resources(self):
        """Snakemake passes over a misspelt resource too. Only what is like a known one: a rule may use others in its own ways."""
        from .profiles import known_resources, meant_resource

        settings = self.workflow.resource_settings
        known = known_resources({*settings.resources, *settings.overwrite_resource_scopes})
        asked = [("default-resources", name) for name in settings.default_resources or ()]
        asked += [
            (f"set-resources: {rule}", name) for rule, own in settings.overwrite_resources.items() for name in own
        ]
        for where, name in sorted(set(asked)):
            if name not in known and (hint := meant_resource(name, known)):
                self.logger.warning(f"{where}: {name}: no such resource; this has no effect: {hint}")

    def run_job(self, job):
        from .sigterm import answer_in_a_thread

        answer_in_a_thread()  # not earlier: the scheduler sets its handler after it made us
        try:
            submission = self._submit_patiently(job)
        except (ValueError, OSError) as error:  # any other would make Snakemake cancel every job that runs
            words = str(error)
            if isinstance(error, OSError):  # a full disk: Python does not name an open file, and a retry may help
                words = f"{error.filename or self.driver.folder}: not submitted: {error.strerror or error}"
            else:
                job.attempt = max(job.attempt, job.restart_times + 1)  # asking again would be refused again
            self.logger.error(words)
            self.report_job_submission(info := SubmittedJobInfo(job), register_job=False)
            with self.lock:
                self.active_jobs.remove(info)
            self.report_job_error(info, msg=words)
            return
        self.report_job_submission(SubmittedJobInfo(job, submission.job_id, {"submission": submission}))

    def _submit_patiently(self, job):
        """A cluster that takes no job now is asked until it does: no other could be submitted meanwhile either."""
        from .failures import NotReached

        while True:
            try:
                return self.driver.submit(job, lambda: self.format_job_exec(job))
            except NotReached as error:
                if not self.ready:
                    raise
                self.logger.warning(f"{error}; asking again in {FULL_SECONDS} s")
                time.sleep(FULL_SECONDS)

    async def check_active_jobs(self, active_jobs):
        if not self.ready:
            return
        by_id = {info.aux["submission"].job_id: info for info in active_jobs}
        try:
            outcomes = self.driver.look([info.aux["submission"] for info in active_jobs])
        except Exception as error:  # an exception here would end the polling thread, and with it the run
            self.logger.warning(f"Looking at the jobs failed, trying again: {type(error).__name__}: {error}")
            outcomes = {}
        for job_id, info in by_id.items():
            outcome = outcomes.get(job_id)
            if outcome is None:
                yield info
            elif outcome.success:
                self.driver.progress.clear()
                self.report_job_success(info)
            else:
                self.driver.progress.clear()
                self.logger.error(outcome.message)
                if outcome.final:
                    info.job.attempt = max(info.job.attempt, info.job.restart_times + 1)
                self.report_job_error(info, msg=outcome.message.splitlines()[0] + ". ")

    async def sleep(self):
        """Between two looks: show progress, and look at once when a job says that it ended or the run is over."""
        end = time.monotonic() + self.next_seconds_between_status_checks
        while self.wait and self.ready:
            left = end - time.monotonic()
            if left <= 0 or self._wants_a_look():
                break
            await asyncio.sleep(min(left, 0.25))
        else:
            await asyncio.sleep(0.05)

    def _wants_a_look(self) -> bool:
        """Whether a job says that it ended; shows progress meanwhile."""
        try:
            if self.driver.wants_a_look():
                return True
            self.driver.show_progress()
        except Exception as error:  # as above: the polling thread must not end
            if str(error) != self._complaint:
                self._complaint = str(error)
                self.logger.warning(f"Reading what the jobs say failed, trying again: {type(error).__name__}: {error}")
        return False

    def cancel_jobs(self, active_jobs):
        self.ready = False
        self.driver.cancel()

    def shutdown(self):
        super().shutdown()
        if self.driver:
            self.driver.close()

    def get_python_executable(self):
        return f"{shlex.quote(sys.executable)} -m {__name__}.sigterm"  # Snakemake appends `-m snakemake ...`

    def additional_general_args(self):
        return "--quiet host"

    def get_job_exec_prefix(self, job):
        return (
            f"cd {shlex.quote(os.path.abspath(self.workflow.workdir_init))}"
            if not self.workflow.storage_settings.assume_common_workdir
            else ""
        )

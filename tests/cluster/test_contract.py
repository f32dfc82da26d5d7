"""Snakemake's own contract suite for executors, on a real SLURM."""

import pytest
import snakemake.common.tests
from snakemake_executor_plugin_submitit import ExecutorSettings


class TestSlurm(snakemake.common.tests.TestWorkflowsLocalStorageBase):
    __test__ = True

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster):
        self.cluster = cluster

    def get_executor(self) -> str:
        return "submitit"

    def get_executor_settings(self) -> ExecutorSettings:
        return ExecutorSettings(cluster="slurm", poll_seconds=2.0)

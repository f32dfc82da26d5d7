"""A real SLURM on this machine for the session: munged, MariaDB, slurmdbd, slurmctld and two slurmd, on loopback.

Two nodes of 16 CPUs and four (fake) A100s; partitions `gpu` (preemptible, requeues), `gpu_high` (preempts it) and `general`.
Needs Debian's slurm-wlm, slurmdbd, munge, mariadb-server-core and mariadb-client-core; skipped where they are missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # tests are imported by path: this is how they find their helpers
from slurm_lab import MEASURED, SYSTEM_PATH, Driver, Lab, recoveries  # noqa: E402

DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def lab():
    missing = [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM_PATH}")]
    if missing:
        pytest.skip(f"no SLURM on this machine: {', '.join(missing)} missing")
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))  # unix socket paths are limited to 108 bytes
    lab = Lab(folder, 20000 + os.getpid() % 200 * 50)
    try:
        subprocess.run([HERE / "lab/start.sh"], env=lab.environment, check=True, timeout=90)
        os.environ["SLURM_CONF"] = lab.environment["SLURM_CONF"]
        os.environ["PATH"] = lab.environment["PATH"]
        yield lab
    finally:
        subprocess.run([HERE / "lab/stop.sh"], env=lab.environment, timeout=90)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(lab):
    lab.heal()
    yield lab
    lab.call("scancel", f"--user={os.getuid()}", check=False)


@pytest.fixture
def run(cluster, tmp_path, request):
    """`run(snakefile, *arguments, resources=...)` starts a driver; what is left of it at the end is killed."""
    drivers = []
    for name in ("trainer.py",):
        shutil.copy(HERE / name, tmp_path)

    def start(snakefile: str, *arguments: str, **options) -> Driver:
        (tmp_path / "Snakefile").write_text(snakefile)
        drivers.append(Driver(cluster, tmp_path, *arguments, **options))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.process.kill()
            driver.process.wait()
    if drivers:
        MEASURED.extend((request.node.name, line) for line in recoveries(drivers[-1].attempts()))


def pytest_terminal_summary(terminalreporter):
    """What each fault cost, and the other numbers that the tests took: they are why these tests exist."""
    if MEASURED:
        terminalreporter.section("measured on this cluster")
        for name, line in MEASURED:
            terminalreporter.write_line(f"{name.removeprefix('test_').replace('_', ' ')}: {line}")

"""SIGTERM, however often, hangs no Snakemake: neither the driver nor the one inside a job, where the rule decides."""

import random
import signal
import subprocess
import sys
import time

SNAKEMAKE = ["-m", "snakemake", "--cores", "1", "--nolock", "out"]
INSIDE = [sys.executable, "-m", "snakemake_executor_plugin_submitit.sigterm", *SNAKEMAKE]
DRIVER = [sys.executable, *SNAKEMAKE, "--executor", "submitit", "--jobs", "1"]

RULE = """
rule wait:
    output: "out"
    shell: "touch started; while ! [ -e go ]; do sleep 0.1; done; touch {output}; exit $(cat go)"
"""


def ended(tmp_path, command: list[str], exit_code: int) -> tuple[int, str]:
    """Exit code and output of a run whose rule ended with `exit_code` after 150 pairs of SIGTERM, up to 1 ms apart."""
    (tmp_path / "Snakefile").write_text(RULE)
    draw = random.Random(0)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    end = time.time() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.time() < end
        time.sleep(0.05)
    for _ in range(150):
        process.send_signal(signal.SIGTERM)
        time.sleep(draw.random() * 1e-3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    (tmp_path / "go").write_text(str(exit_code))
    try:
        code = process.wait(30)
    finally:
        process.kill()
    return code, (tmp_path / "log").read_text()


def test_signals_close_together_do_not_hang_a_job(tmp_path):
    code, log = ended(tmp_path, INSIDE, 85)
    assert code == 1
    assert "non-zero exit" in log
    assert not (tmp_path / "out").exists()


def test_a_command_that_succeeds_in_the_grace_time_has_succeeded(tmp_path):
    """Snakemake's own handler would make it a failure, and the job would run again."""
    code, log = ended(tmp_path, INSIDE, 0)
    assert code == 0, log
    assert (tmp_path / "out").exists()


def test_signals_close_together_do_not_hang_the_driver(tmp_path):
    """It waits for what runs, then ends."""
    code, log = ended(tmp_path, DRIVER, 0)
    assert code == 1, log
    assert "Will exit after finishing currently running jobs" in log
    assert (tmp_path / "out").exists()

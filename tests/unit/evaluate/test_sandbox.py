import os
import socket
import time
from pathlib import Path

import pytest

from nanochat.evaluate import sandbox
from nanochat.evaluate.sandbox import Limits, run, run_all

QUICK = Limits(seconds=1.0)


def test_a_program_that_reaches_its_end_passes():
    assert run("import math\nassert math.sqrt(4) == 2").status == "passed"


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('x' * 10_000)", "ValueError"),
        ("import numpy", "ModuleNotFoundError"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "E"),
        ("\ud800 = 1", "Error"),
        ("x = '\x00'", "Error"),
    ],
)
def test_a_program_that_raises_fails_with_its_reason(program, detail):
    outcome = run(program)
    assert outcome.status == "failed"
    assert detail in outcome.detail
    assert len(outcome.detail) <= 300


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit(0)", "exit(0)"]
)
def test_leaving_early_does_not_pass(leave):
    assert run(f"{leave}\nassert False").status == "failed"


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "10**10**8", "input()\nwhile 1: pass"]
)
def test_an_endless_program_ends_at_the_deadline(program):
    started = time.monotonic()
    assert run(program, QUICK).status in ("timed_out", "failed")
    assert time.monotonic() - started < 15


def test_a_program_that_ignores_signals_is_killed():
    program = (
        "import signal\nfor s in set(signal.Signals) - {9, 19}:\n  signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    )
    assert run(program, QUICK).status == "timed_out"


def test_memory_is_limited():
    outcome = run("x = bytearray(2 * 2**30)")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.detail


def test_files_are_limited_and_land_in_a_folder_that_is_removed(tmp_path):
    outcome = run("open('big', 'wb').write(b'0' * 4 * 2**20)")
    assert outcome.status != "passed"
    outcome = run("import os; open('here', 'w').write('x'); raise ValueError(os.getcwd())")
    folder = outcome.detail.partition(": ")[2]
    assert "nanochat-sandbox-" in folder
    assert not Path(folder).exists()


@pytest.mark.parametrize("namespaces", [True, False])
def test_children_do_not_outlive_the_program(tmp_path, monkeypatch, namespaces):
    """A detached grandchild that would write a file after a while is dead by then, also where no namespace is to be had."""
    if not namespaces:
        monkeypatch.setattr(sandbox, "WARDEN", _without_namespaces(tmp_path))
    marker = tmp_path / "marker"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
        f"    time.sleep(1.5)\n    open({str(marker)!r}, 'w')\n  os._exit(0)\n"
    )
    assert run(program, Limits(seconds=5.0, processes=1_000_000)).status == "passed"
    time.sleep(2)
    assert not marker.exists()


def _without_namespaces(folder: Path) -> Path:
    """The warden on a kernel that refuses `unshare`."""
    source = sandbox.WARDEN.read_text()
    assert source.count("libc.unshare(") == 3
    path = folder / "warden.py"
    path.write_text(source.replace("libc.unshare(", "(lambda flags: -1)("))
    return path


def test_the_network_is_out_of_reach():
    """Where namespaces are allowed, not even a server on this machine can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=0.5)")
    if "network" not in outcome.isolated:
        pytest.skip("this kernel allows no namespaces here")
    assert outcome.status == "failed"


def test_our_files_are_out_of_reach(tmp_path):
    mine = tmp_path / "results"
    mine.write_text("a model")
    program = f"import os\nos.remove({str(mine)!r})"
    outcome = run(program)
    if "files" not in outcome.isolated:
        pytest.skip("this kernel allows no namespaces here")
    assert outcome.status == "failed"
    assert mine.exists()
    assert run(f"open({str(tmp_path / 'new')!r}, 'w')").status == "failed"
    remount = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(None, b'/', None, 32 | 4096, None) == 0"
    assert run(remount).status == "failed"
    assert run("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')").status == "passed"


def test_without_namespaces_the_worst_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "WARDEN", _without_namespaces(tmp_path))
    mine = tmp_path / "results"
    mine.write_text("a model")
    outcome = run(f"import os\nos.remove({str(mine)!r})")
    assert (outcome.status, outcome.isolated, mine.exists()) == ("failed", (), True)
    assert run(f"import os\nos.kill({os.getpid()}, 0)").status == "failed"


def test_a_program_hashes_alike_at_every_run_and_cannot_signal_its_warden():
    assert len({run("raise ValueError(hash('abc'))").detail for _ in range(3)}) == 1
    assert run("import os; os.kill(0, 9)").isolated


def test_our_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert run("import os; assert 'SECRET_TOKEN' not in os.environ").status == "passed"


def test_our_processes_are_out_of_reach():
    outcome = run(f"import os; os.kill({os.getpid()}, 0)")
    if "processes" not in outcome.isolated:
        pytest.skip("this kernel allows no namespaces here")
    assert outcome.status == "failed"


def test_many_programs_keep_their_order():
    programs = [f"assert {i} % 3" for i in range(12)]
    assert [outcome.status == "passed" for outcome in run_all(programs)] == [bool(i % 3) for i in range(12)]

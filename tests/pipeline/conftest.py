"""A copy of the repository with a configuration so tiny that the whole pipeline takes a minute or two."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = """\
corpus: {source: bundled, max_bytes: 1500000, validation_fraction: 0.05, shard_bytes: 500000}
tokenizer: {vocab_size: 512}
model: {depth: 2, width: 64, head_dim: 32}
train:
  base: {gpus: 0, sequence_length: 64, tokens_per_step: 1024, steps: 300, validate_every_steps: 100, validation_tokens: 2048,
         checkpoint_every_seconds: 1.0}
  mid: {gpus: 0, sequence_length: 256, tokens_per_step: 2048, validation_tokens: 2048,
        mixture: [{name: chatterbot, conversations: 100}, {name: arithmetic, conversations: 50}]}
  sft: {gpus: 0, sequence_length: 256, tokens_per_step: 2048, validation_tokens: 2048,
        mixture: [{name: chatterbot, conversations: 60}, {name: identity, conversations: 10}]}
batch_size: {cache: "", max_device_batch_size: 16}
evaluate: {gpus: 0, items: 8, humaneval_problems: 2, humaneval_tokens: 8, validation_tokens: 4096, sample_tokens: 12}
benchmark: {gpus: 0, steps: 2, batch_sizes: [1, 2], prompt_tokens: 8, new_tokens: 8}
"""


class Checkout:
    """A working copy; commands run in it as a user would type them."""

    settings = TINY

    def __init__(self, folder: Path):
        self.folder = folder
        names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for name in filter(None, names.stdout.split("\0")):
            if not name.startswith(("tests/", "docs/")) and (REPOSITORY / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, folder / name)
        shutil.copytree(folder / "profiles/local", folder / "profiles/tiny")
        profile = folder / "profiles/tiny/config.yaml"
        profile.write_text(profile.read_text().replace("profiles/local/", "profiles/tiny/"))
        self.configure(TINY)
        # The environment that runs the tests stands for the one that `make` would install.
        self.environment = folder / "environment"
        (self.environment / "bin").mkdir(parents=True)
        for program in Path(sys.executable).parent.iterdir():
            (self.environment / "bin" / program.name).symlink_to(program)
        (self.environment / "installed").touch()

    def configure(self, settings: str) -> None:
        (self.folder / "profiles/tiny/settings.yaml").write_text(settings)

    def start(self, *command: str) -> subprocess.Popen:
        log = open(self.folder / "output.txt", "w")  # noqa: SIM115 the process writes on
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def run(self, *command: str, timeout: float = 600) -> str:
        """Output of a command that must succeed."""
        code, output = self.finish(self.start(*command), timeout)
        assert code == 0, output[-6000:]
        return output

    def finish(self, process: subprocess.Popen, timeout: float = 600) -> tuple[int, str]:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill(process.pid)
            code = -1
        return code, (self.folder / "output.txt").read_text()

    def make_run(self) -> tuple[str, ...]:
        return ("make", "run", f"VENV={self.environment}", "PROFILE=profiles/tiny")

    def snakemake(self, *arguments: str) -> tuple[str, ...]:
        return ("snakemake", "--profile", "profiles/tiny", *arguments)

    def wait_for(self, condition, process: subprocess.Popen, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert process.poll() is None, (self.folder / "output.txt").read_text()[-6000:]
            assert time.monotonic() < deadline, "the run did not come that far"
            time.sleep(0.1)

    def kill(self, pid: int) -> int:
        """SIGKILL to a process and everything below it, as a power cut would; returns how many there were."""
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
        for process in processes:
            process.suspend()  # so that none starts another while the others die
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
        return len(processes)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def fresh_checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)

"""The huggingface source, through the real huggingface_hub client, against a small mirror on this machine (HF_ENDPOINT)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.corpus_files import Corpus

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/texts"


class Mirror(ThreadingHTTPServer):
    """The two addresses of the hub that a download needs: what a repository holds, and its files, also from the middle."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut_once: set[str] = set()  # files whose first download breaks off in the middle
        self.served: list[str] = []  # files, in the order of the downloads


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith(f"/api/datasets/{REPO}/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.server.files.items()]
            return self._answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        prefix = f"/datasets/{REPO}/resolve/{COMMIT}/"
        if path.startswith(prefix) and (content := self.server.files.get(path.removeprefix(prefix))) is not None:
            return self._file(path.removeprefix(prefix), content)
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _file(self, name: str, content: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self._answer(200, content, headers)
        wanted = self.headers.get("Range")
        self.server.served.append(name)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if name in self.server.cut_once:
            self.server.cut_once.remove(name)
            return self._answer(200, content, headers, send=content[: len(content) // 2])
        return self._answer(206 if start else 200, content[start:], headers)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, send: bytes | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else send)
        if send is not None:
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def mirror():
    files = {f"shard_{i:05}.parquet": parquet([f"shard {i} document {j} " * 30 for j in range(60)]) for i in range(3)}
    server = Mirror({**files, "README.md": b"# Texts", "other.parquet": parquet(["not asked for"])})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def collect(tmp_path):
    """Run the command as the workflow does, in a process of its own: HF_ENDPOINT is read when the client is imported."""

    def environment(endpoint: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }

    def run(endpoint: str, **changes) -> subprocess.CompletedProcess:
        corpus = {
            "source": "huggingface",
            "repo_id": REPO,
            "pattern": "shard_0000?.parquet",
            "validation_fraction": 0.1,
        }
        (tmp_path / "corpus.json").write_text(json.dumps({"seed": 1, "corpus": {**corpus, **changes}}))
        command = [
            "-m",
            "nanochat",
            "corpus",
            "--config",
            str(tmp_path / "corpus.json"),
            "--out",
            str(tmp_path / "out"),
        ]
        return subprocess.run(
            [sys.executable, *command], env=environment(endpoint), capture_output=True, text=True, timeout=120
        )

    run.environment = environment
    return run


def address(mirror: Mirror) -> str:
    return f"http://127.0.0.1:{mirror.server_port}"


def test_files_that_match_come_from_the_mirror_and_one_commit(mirror, collect, tmp_path):
    mirror.cut_once.add("shard_00001.parquet")
    done = collect(address(mirror))
    assert done.returncode == 0, done.stderr
    opened = Corpus.open(tmp_path / "out")
    texts = {d.text for split in ("train", "validation") for d in opened.documents(split)}
    assert texts == {f"shard {i} document {j} " * 30 for i in range(3) for j in range(60)}
    assert opened.manifest["provenance"]["commit"] == COMMIT
    assert set(mirror.served) == {f"shard_{i:05}.parquet" for i in range(3)}
    # The one that broke off was asked for again.
    assert mirror.served.count("shard_00001.parquet") == 2
    # Nothing is kept twice.
    assert not list((tmp_path / "out").rglob("shard_*.parquet"))
    # A second run asks for nothing.
    served = len(mirror.served)
    assert "complete already" in collect(address(mirror)).stderr
    assert len(mirror.served) == served


def test_a_bound_on_the_text_spares_the_downloads_behind_it(mirror, collect, tmp_path):
    mirror.files |= {f"shard_1{i:04}.parquet": mirror.files["shard_00000.parquet"] for i in range(60)}
    done = collect(address(mirror), pattern="shard_*.parquet", max_bytes=50_000)
    assert done.returncode == 0, done.stderr
    assert 40_000 < sum(shard.text_bytes for shard in Corpus.open(tmp_path / "out").shards) <= 50_000
    assert len(set(mirror.served)) < 63


BAD = [
    ({"repo_id": "someone/else"}, "corpus.repo_id = 'someone/else': no such dataset on http://127.0.0.1"),
    ({"repo_id": "a/b/c"}, "corpus.repo_id = 'a/b/c': no such dataset"),
    ({"revision": "v9"}, "corpus.revision = 'v9': someone/texts has no such branch, tag or commit"),
    ({"pattern": "shard_9*"}, "corpus.pattern = 'shard_9*': matches no file of someone/texts, which holds README.md"),
    ({"pattern": "*.md"}, "corpus.pattern = '*.md': matches no .parquet, .jsonl, .txt file"),
]

# All of them in one process: the client takes a second to import.
ASK = """
import json, sys
from nanochat.data.huggingface import list_files
from nanochat.errors import UserError
for changes in json.loads(sys.argv[1]):
    try:
        list_files(**{"repo_id": "someone/texts", "pattern": "shard_*", "revision": "main", **changes})
    except UserError as error:
        print(error)
"""


def test_what_cannot_be_had_is_named(mirror, collect):
    command = [sys.executable, "-c", ASK, json.dumps([changes for changes, _ in BAD])]
    done = subprocess.run(command, env=collect.environment(address(mirror)), capture_output=True, text=True, timeout=60)
    for line, (_, message) in zip(done.stdout.splitlines(), BAD, strict=True):
        assert message in line


def test_a_column_that_is_missing_in_a_downloaded_file_is_named(mirror, collect):
    done = collect(address(mirror), text_column="body")
    assert done.returncode == 2
    assert "shard_00000.parquet: corpus.text_column = 'body': no such column. It has: text" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_network_is_said_in_one_line(collect):
    done = collect("http://127.0.0.1:9")
    assert done.returncode == 2
    assert "http://127.0.0.1:9 gives no answer" in done.stderr
    assert "Traceback" not in done.stderr

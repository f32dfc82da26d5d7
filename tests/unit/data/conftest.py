"""One small run of the data stages on the bundled text, shared by the tests."""

import os
from pathlib import Path

import pytest

from nanochat import command_settings, config
from nanochat.data import corpus, token_shards, train_tokenizer
from nanochat.data.corpus_files import Corpus
from nanochat.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    settings = config.Corpus(source="bundled", validation_fraction=0.05, shard_bytes=1_500_000, max_bytes=5_000_000)
    corpus.build(command_settings.CorpusSettings(seed=1, corpus=settings), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    opened = Corpus.open(corpus_folder)
    Tokenizer(train_tokenizer.learn(train_tokenizer.sample(opened, 2_000_000), 1024), opened.sha256).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def tokens_folder(corpus_folder, tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    token_shards.build(corpus_folder, tokenizer_folder, folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real corpora that the repository does not ship."""
    folder = os.environ.get("NANOCHAT_DATA")
    if not folder:
        pytest.skip("NANOCHAT_DATA is not set: the folder of real corpora")
    return Path(folder)


@pytest.fixture
def directory_settings():
    """Settings of a corpus of one's own files."""

    def make(*paths: Path | str, **changes) -> command_settings.CorpusSettings:
        values = {"source": "directory", "paths": [str(path) for path in paths], "validation_fraction": 0.2, **changes}
        return command_settings.CorpusSettings(seed=1, corpus=config.Corpus(**values))

    return make

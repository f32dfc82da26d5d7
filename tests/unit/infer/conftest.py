import pytest
from infer_models import tiny_model

from nanochat.model.gpt import GPT


@pytest.fixture(scope="session")
def model() -> GPT:
    return tiny_model()

"""Files of a dataset repository on the Hugging Face hub or a mirror of it (HF_ENDPOINT, HF_TOKEN, proxies: as huggingface_hub reads them)."""

import fnmatch
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.text_files import SUFFIXES
from nanochat.errors import UserError

ATTEMPTS = 5


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit."""

    repo_id: str
    commit: str
    name: str
    size_bytes: int


def list_files(repo_id: str, pattern: str, revision: str) -> list[RemoteFile]:
    """The files that match, sorted, pinned to the commit that `revision` is now. UserError when there are none or no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(repo_id, revision=revision, files_metadata=True, timeout=60)
    except GatedRepoError:
        raise UserError(
            f"corpus.repo_id = {repo_id!r}: access must be granted on its page first; then run `hf auth login` (jobs read the token in your home)."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"corpus.repo_id = {repo_id!r}: no such dataset on {_endpoint()}. It has the form owner/name; for a private one run `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"corpus.revision = {revision!r}: {repo_id} has no such branch, tag or commit. Most have `main`."
        ) from None
    except Exception as error:  # httpx or requests errors, by version of the hub's library
        raise UserError(
            f"corpus.repo_id = {repo_id!r}: {_endpoint()} gives no answer ({_first_line(error)}). "
            "No network on this node? Set HF_ENDPOINT to a mirror, or use corpus.source: directory."
        ) from None
    siblings = sorted(info.siblings or [], key=lambda sibling: sibling.rfilename)
    names = [sibling for sibling in siblings if fnmatch.fnmatchcase(sibling.rfilename, pattern)]
    files = [sibling for sibling in names if sibling.rfilename.endswith(SUFFIXES)]
    if not files:
        some = ", ".join(sibling.rfilename for sibling in siblings[:3]) or "no file"
        what = f"matches no {', '.join(SUFFIXES)} file" if names else "matches no file"
        raise UserError(f"corpus.pattern = {pattern!r}: {what} of {repo_id}, which holds {some}, ...")
    return [RemoteFile(repo_id, info.sha or revision, file.rfilename, file.size or 0) for file in files]


def download(file: RemoteFile, folder: Path) -> Path:
    """Fetch the file below `folder`; goes on where an earlier attempt ended. UserError after some attempts."""
    from huggingface_hub import hf_hub_download

    for attempt in range(ATTEMPTS):
        try:
            path = hf_hub_download(file.repo_id, file.name, repo_type="dataset", revision=file.commit, local_dir=folder)
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f"{file.repo_id}: {file.name} could not be downloaded from {_endpoint()} ({_first_line(error)}). "
                    "Run the target `corpus` again: what is there already is kept."
                ) from None
            time.sleep(2.0**attempt)
        else:
            return Path(path)
    raise AssertionError("unreachable")


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")

"""Uploads an export to the hub, by huggingface_hub and with its own token; the files stay on this machine, too."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from rlcm_fast.faults import Fault


class NotUploaded(Fault):
    """The hub could not be reached, or refused the upload."""


def check_repository(repository: str) -> None:
    """Checks what is known before anything is written: the form of the name, and that there is a token.

    Raises:
        ValueError: the name cannot be one of the hub's, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"push-to-hub={repository} is no name of the hub ({reason}); give owner/name") from error
    if get_token() is None:
        raise ValueError(f"push-to-hub={repository} needs a token of the hub; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Makes the repository unless it exists, uploads a folder as one commit, and returns the commit's address.

    Raises:
        NotUploaded: the hub could not be reached, or refused.
    """
    hub = HfApi()
    try:
        # An existing repository keeps its visibility.
        full_name = hub.create_repo(repository, private=True if private else None, exist_ok=True).repo_id
        commit = hub.upload_folder(repo_id=full_name, folder_path=folder, commit_message=message)
    except (HTTPError, OSError) as error:  # OSError: offline mode, a file that cannot be read
        raise NotUploaded(
            f"push-to-hub={repository} failed: {_reason(error)}; the files are in {folder}; to try again, run"
            f" `hf upload {repository} {folder}`"
        ) from error
    return commit.commit_url


def _reason(error: Exception) -> str:
    """Says in a few words why; the hub's messages have several lines."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the hub does not accept the token (401); run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); give a token with the right to write, or another owner"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].rstrip(".") if status else f"the hub was not reached ({text[:200].rstrip('.')})"

"""Asks the hub what can be known before a model's weights are downloaded: is it there, and what do its configs say?

Whether the hub can be reached is asked once and within seconds, before anybody waits for its many retries.
"""

from __future__ import annotations

import functools
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rlcm_fast.patience import NotDone, call_within

SECONDS = 5.0  # for the name, the connection and the answer together
AWAY = (
    "it is not in the hub's cache, and the hub cannot be reached",
    "check the network (or HF_ENDPOINT and HF_HUB_OFFLINE), or give a folder",
)
"""The reason and the way out where the hub gives no answer."""
CONFIGS = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json")
"""The files of a model's repository that say what it is; some kilobytes each."""


def check_there(hub_id: str, named: str) -> None:
    """Refuses a model that has to be downloaded from a hub that gives no answer; raises ValueError.

    hub_id: owner/name, perhaps with a file behind it. What is in the cache passes; whether the name exists is another
    question, which only the hub answers.
    """
    from huggingface_hub import constants

    owner, _, rest = hub_id.partition("/")
    folder = "--".join(["models", owner, *filter(None, [rest.partition("/")[0]])])
    if any((Path(constants.HF_HUB_CACHE) / folder / "snapshots").rglob("*.safetensors")):  # and not its configs alone
        return
    if constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        reason, remedy = AWAY
        raise ValueError(f"{named} could not be loaded: {reason}; {remedy}")


def fetch_configs(hub_id: str, revision: str | None, named: str) -> Path:
    """Returns the snapshot in the hub's cache that has a model's configs, which are downloaded if they are not there.

    Raises:
        ValueError: the hub has no such model or revision, keeps it from you, or gives no answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(CONFIGS), tqdm_class=_silent_bar())
        )
    except GatedRepoError:
        reason, remedy = "its owner gives it to those who ask", "ask on its page, and run `hf auth login`"
    except RepositoryNotFoundError:
        reason, remedy = "the hub has no such model, or it is private", "check the name, or run `hf auth login`"
    except RevisionNotFoundError:
        reason, remedy = f"it has no revision {revision}", "check the revision, or leave it out"
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason, remedy = AWAY if is_away(error) else (" ".join(str(error).split())[:200], "check the name")
    raise ValueError(f"{named} could not be loaded: {reason}; {remedy}")


def _silent_bar() -> Any:
    """Returns a progress bar that shows nothing, because configs take a second."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **{**keywords, "disable": True})

    return Silent


def cached_folder(path: str, file: str, revision: str | None) -> Path | None:
    """Returns the folder of a model, or its snapshot in the hub's cache; None if `file` is not in it."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return Path(path) if (Path(path) / file).is_file() else None
    found = try_to_load_from_cache(path, file, revision=revision)
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def is_away(error: BaseException | None) -> bool:
    """Tells whether an error, or what it came from, is that a hub gave no answer; a wrong name is an answer."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    answered = any(isinstance(one, errors.RepositoryNotFoundError | errors.RevisionNotFoundError) for one in seen)
    kinds = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.TransportError)
    return not answered and any(isinstance(one, kinds) for one in seen)


@functools.cache
def is_reachable(address: str) -> bool:
    """Tells whether a server answers, whatever it says; proxies of the environment are used."""
    request = urllib.request.Request(address, method="HEAD")

    def ask() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS):
                return True
        except urllib.error.HTTPError:
            return True  # an answer
        except (OSError, ValueError):
            return False

    try:
        return call_within(SECONDS, ask)
    except NotDone:
        return False

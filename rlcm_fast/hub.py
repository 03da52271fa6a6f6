"""Asks whether the hub can be reached, once and within seconds, before anybody waits for its many retries."""

from __future__ import annotations

import functools
import urllib.error
import urllib.request
from pathlib import Path

from rlcm_fast.patience import NotDone, call_within

SECONDS = 5.0  # for the name, the connection and the answer together
AWAY = (
    "it is not in the hub's cache, and the hub cannot be reached",
    "check the network (or HF_ENDPOINT and HF_HUB_OFFLINE), or give a folder",
)
"""The reason and the way out where the hub gives no answer."""


def check_there(hub_id: str, named: str) -> None:
    """Refuses a model that has to be downloaded from a hub that gives no answer; raises ValueError.

    hub_id: owner/name, perhaps with a file behind it. What is in the cache passes; whether the name exists is another
    question, which only the hub answers.
    """
    from huggingface_hub import constants

    owner, _, rest = hub_id.partition("/")
    folder = "--".join(["models", owner, *filter(None, [rest.partition("/")[0]])])
    if any((Path(constants.HF_HUB_CACHE) / folder / "snapshots").glob("*")):
        return
    if constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        reason, remedy = AWAY
        raise ValueError(f"{named} could not be loaded: {reason}; {remedy}")


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

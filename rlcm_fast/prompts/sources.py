"""Reads the prompts of a source: a text file, a JSON-lines file, a list made by code, or a dataset.

    animals.txt                  one prompt per line; blank lines are skipped
    animals.jsonl                one object per line: {"text": "a cat", "task": "animals"}; you may leave out the task
    shapes:one                   a name of BUILT_IN
    package.module:function      a function of yours, marked with @rlcm_fast.plug_in: called without arguments, it
                                 returns a list of str or of Prompt
    hf:PATH?column=prompt        a dataset of the hub or of a folder, streamed (stream.py)

Prompts keep the order of the source, and a prompt that is listed twice counts twice; the sampler shuffles. A file of at
most MOST_CHECKED prompts is read and checked whole. A larger file stays on disk (files.py), so a bad .jsonl line in it
is found only when a run reads that line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from rlcm_fast.config.files import is_text
from rlcm_fast.given import PREFIX as GIVEN
from rlcm_fast.given import check_is_given
from rlcm_fast.patience import NotDone, call_within
from rlcm_fast.plugins import check_accepts, check_unimported, load_class, worded
from rlcm_fast.prompts.files import PromptFile, is_prompt_file
from rlcm_fast.prompts.stream import PREFIX, check_stream, first_window
from rlcm_fast.trajectory import Prompt

MOST_CHECKED = 100_000
MOST_RETURNED = 1_000_000
"""Prompts that a function may return: every process holds them all, 0.2 GB; a file of any size stays on the disk."""
SECONDS = 60.0
"""How long a function of prompts may take."""

_SHAPES = {"one": "one_shape", "two": "two_shapes", "neutral": "neutral", "all": "all_captions"}

# Plug-in strings and no imports, because rooms of floor 2 must not import each other.
BUILT_IN = {f"shapes:{name}": f"rlcm_fast.shapes.prompts:{function}" for name, function in _SHAPES.items()} | {
    f"shapes:{name}:held_out": f"rlcm_fast.shapes.prompts:{function}_held_out" for name, function in _SHAPES.items()
}


def load_prompts(source: str, field: str = "prompts.source") -> Sequence[Prompt]:
    """All prompts of `source`, at least one; only the first window of a dataset. Errors name the config `field`."""
    where = f"{field}={source}"
    check_is_given(source, field, {})

    # Tell the kinds of sources apart by their form.
    if source.startswith(PREFIX):
        prompts = first_window(source, where)
    elif source in BUILT_IN:
        prompts = _call(source, where)
    elif is_prompt_file(source):
        prompts = _read_file(Path(source), where)
    elif _is_function(source):
        prompts = _call(source, where)
    else:
        raise ValueError(
            f"{where} is no prompt source; give a .txt file (one prompt per line), a .jsonl file, hf:DATASET,"
            f" package.module:function or one of {', '.join(BUILT_IN)}"
        )

    # A run needs at least one prompt.
    if not prompts:
        raise ValueError(f"{where} holds no prompts; give at least one")
    return prompts


def check_prompts(source: str, field: str = "prompts.source") -> str | None:
    """Raise what `load_prompts` would raise, but open no dataset, which may need a network, and call no function.

    Returns the module that a run would import for a function of yours, "MODULE of FILE".
    """
    if source.startswith(PREFIX):
        check_stream(source, f"{field}={source}")
    elif _is_function(source) and not source.startswith(GIVEN):
        return check_unimported(source, BUILT_IN, field)
    else:
        load_prompts(source, field)
    return None


def _is_function(source: str) -> bool:
    """Tells whether a source names a function of yours, by its form."""
    is_other = source.startswith((PREFIX, "shapes:")) or source in BUILT_IN or is_prompt_file(source)
    return ":" in source and not is_other


def _call(source: str, where: str) -> list[Prompt]:
    """The prompts that the function named by `source` returns, within SECONDS."""
    # Call the function; it may return anything, or never.
    remedy = "return a list of non-empty str or of Prompt"
    try:
        function = load_class(source, BUILT_IN)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_accepts(function, f"{where} is called without arguments")
    try:
        with worded(f"{where}:", "repair the function"):
            items = call_within(SECONDS, lambda: _listed(function()))
    except NotDone as error:
        raise ValueError(
            f"{where} has not returned after {SECONDS:g} s; write its prompts into a .txt file once, and name that"
        ) from error

    # Check what it returned.
    if items is None:
        raise ValueError(f"{where} returned no list; {remedy}")
    if len(items) > MOST_RETURNED:
        raise ValueError(
            f"{where} returns more than {MOST_RETURNED:,} prompts, or never ends; return fewer, or write them into a"
            " .txt file, which stays on the disk"
        )
    prompts = []
    for item in items:
        prompt = Prompt(item) if isinstance(item, str) else item
        if not isinstance(prompt, Prompt) or not prompt.text.strip() or not is_text(prompt.text):
            raise ValueError(f"{where} returned the prompt {prompt!r}; {remedy}")
        prompts.append(prompt)
    return prompts


def _listed(items: object) -> list[object] | None:
    """The items as a list, at most one more than are allowed; None for a text, a mapping and what is no collection."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        return None
    return list(islice(items, MOST_RETURNED + 1))


def _read_file(path: Path, where: str) -> Sequence[Prompt]:
    if not path.is_file():
        raise ValueError(
            f"{where}: there is no such file under {Path.cwd()}; give the path of a .txt file (one prompt per line), of"
            f" a .jsonl file, or one of {', '.join(BUILT_IN)}"
        )
    prompts = PromptFile(path, where)
    if not prompts:
        raise ValueError(f"{where} is an empty file; write one prompt per line")
    return prompts[:] if len(prompts) <= MOST_CHECKED else prompts

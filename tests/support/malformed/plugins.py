"""Rewards and prompts: names, arguments, classes and functions that go wrong, and files."""

from __future__ import annotations

import json

import tiny_runs

from malformed import Case, Place, writes

HERE = "malformed_plugins"
_ANSWERS = (
    *("none", "a list", "an array", "a number", "a dict", "a tuple", "a text", "one", "three", "a column"),
    *("no dimension", "empty", "double", "half", "whole", "bool", "complex", "nan", "inf", "one nan", "the images"),
)
_RAISED = (
    *("KeyError", "ValueError", "TypeError", "RuntimeError", "OSError", "SystemExit", "StopIteration"),
    *("RecursionError", "AssertionError", "NotImplementedError", "UnicodeDecodeError", "ConnectionError"),
    *("ImportError", "long"),
)
MODULES = {
    "malformed_syntax": "def f(:\n",
    "malformed_missing": "import one_that_is_missing\n",
    "malformed_raises": "1 / 0\n",
    "malformed_exits": "import sys\n\nsys.exit('bye')\n",
}
"""Modules that cannot be imported, and their text."""
_NAMED = {
    "nope": "did you mean|is not known",
    "": "is empty",
    " ": "is empty",
    "jpeg_compresibility": "did you mean jpeg_compressibility",
    ":Thing": "is not known",
    "module:": "is not known",
    "no.such.module:Thing": "no module",
    "...:Thing": "no module",
    f"{HERE}:Nope": "has no Nope",
    f"{HERE}:Answers.nope": "has no nope",
    f"{HERE}:NOT_CALLABLE": "name a class",
    f"{HERE}:NoCall": "no reward",
    f"{HERE}:NoScope": "no reward",
    f"{HERE}:StrangeScope": "no reward",
    f"{HERE}:OneArgument": "__call__",
    f"{HERE}:ThreeArguments": "__call__",
    f"{HERE}:Keywords": "__call__",
    f"{HERE}:NoValue": "no reward",
    f"{HERE}:ValueOfTwo": "value",
    "malformed_syntax:Thing": "SyntaxError",
    "malformed_missing:Thing": "ModuleNotFoundError",
    "malformed_raises:Thing": "ZeroDivisionError",
    "malformed_exits:Thing": "SystemExit",
    "python:given": "was given to the run in Python",
}


def write_modules(place: Place) -> None:
    for name, text in MODULES.items():
        (place.folder / f"{name}.py").write_text(text)


def _reward(name: str, says: str = "rewards[0]", **more: object) -> Case:
    reward = json.dumps([{"name": name, **more}])

    def given(place: Place) -> list[str]:
        write_modules(place)
        return [*tiny_runs.arguments(place.model, place.run_dir, {"num_iterations": 1}), f"--rewards={reward}"]

    return Case(f"reward {name} {more or ''}"[:90], given, says)


def rewards() -> list[Case]:
    """Rewards of all kinds at the door of train.py; and some at the tools'."""
    found = [_reward(name) for name in _NAMED]
    found += [_reward(f"{HERE}:Answers", "it returned", arguments={"answer": answer}) for answer in _ANSWERS]
    found += [_reward(f"{HERE}:Raises", "it raised", arguments={"kind": kind}) for kind in _RAISED]
    kinds = ("KeyError", "OSError", "SystemExit")
    found += [_reward(f"{HERE}:Constructor", kind, arguments={"kind": kind}) for kind in kinds]
    found += [
        _reward(f"{HERE}:SetReward", "describe", arguments={"describe": d}) for d in ("none", "flat", "nan", "half")
    ]
    found += [_reward(f"{HERE}:SetReward", "describe", arguments={"describe": "raises"})]
    found += [
        _reward(f"{HERE}:SetReward", "value", arguments={"value": v})
        for v in ("none", "a number", "rows", "nan", "raises")
    ]
    found += [
        _reward(f"{HERE}:Answers", "nope", arguments={"nope": 1}),
        _reward(f"{HERE}:Raises", "kind"),
        _reward(f"{HERE}:Answers", "group_size=3", group_size=3),
        _reward(f"{HERE}:Answers", "credit=leave_one_out", credit="leave_one_out"),
        _reward(f"{HERE}:Answers", "device=tpu", device="tpu"),
        _reward(f"{HERE}:Answers", "offload=true", offload=True),
        _reward(f"{HERE}:Answers", "weight=0.0", weight=0),
        _reward("http", "url", arguments={"url": "no-url"}),
        _reward("http", "url=http://127.0.0.1:9", arguments={"url": "http://127.0.0.1:9"}),
        _reward("jpeg_compressibility", "quality", arguments={"quality": "high"}),
        _reward("jpeg_compressibility", "nope", arguments={"nope": 1}),
        _reward("aesthetic", "model=no/such/folder", arguments={"model": "no/such/folder"}),
        _reward("clip_score", "dtype=fp8", arguments={"dtype": "fp8"}),
        _reward("distribution_parity", "classifier", group_size=4),
        _reward("vlm_judge", "rewards[0]"),
    ]
    for name in (f"{HERE}:Raises", f"{HERE}:OneArgument", "nope", f"{HERE}:NoScope", "malformed_syntax:Thing"):
        entry = json.dumps({"name": name, "arguments": {"kind": "KeyError"} if name.endswith("Raises") else {}})
        drawn = ["--model", "shapes/lcm", "--num-images", "2", "--rewards", entry]
        given = writes("malformed_syntax.py", MODULES["malformed_syntax"], *drawn)
        found.append(Case(f"evaluate {name}", given, "rewards[0]", "evaluate"))
    return found


_FUNCTIONS = {
    "returns_none": "returned no list",
    "returns_text": "returned no list",
    "returns_bytes": "returned no list",
    "returns_number": "returned no list",
    "returns_mapping": "returned no list",
    "returns_nothing": "holds no prompts",
    "returns_blank": "returned the prompt",
    "returns_numbers": "returned the prompt 1",
    "returns_nones": "returned the prompt None",
    "returns_lists": "returned the prompt",
    "returns_few": "fewer than the prompts.num_prompts",
    "raises": "raised RuntimeError: no prompts",
    "raises_later": "raised KeyError",
    "exits": "raised SystemExit",
    "needs": "is called without arguments",
    "never_ends": "or never ends",
    "sleeps": "has not returned after",
    "Prompts": "returned no list",
    "Nope": "has no Nope",
    "NOT_CALLABLE": "name a class",
}
_FILES: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "is an empty file"),
    "blank.txt": (b" \n\n\t\n", "is an empty file"),
    "one.txt": (b"a cat\n", "fewer than"),
    "latin.txt": (b"caf\xe9\n" * 20, "is not UTF-8"),
    "utf16.txt": ("a cat\n".encode("utf-16") * 9, "is not UTF-8"),
    "empty.jsonl": (b"", "is an empty file"),
    "text.jsonl": (b"a cat\n" * 20, "line 1 is no JSON"),
    "open.jsonl": (b'{"text": "a cat"\n' * 20, "line 1 is no JSON"),
    "list.jsonl": (b'["a cat"]\n' * 20, "line 1 is"),
    "number.jsonl": (b"3\n" * 20, "line 1 is"),
    "null.jsonl": (b"null\n" * 20, "line 1 is"),
    "key.jsonl": (b'{"prompt": "a cat"}\n' * 20, "line 1 is"),
    "more.jsonl": (b'{"text": "a cat", "size": 3}\n' * 20, "line 1 is"),
    "blank.jsonl": (b'{"text": " "}\n' * 20, "a value is no text or empty"),
    "type.jsonl": (b'{"text": 3}\n' * 20, "a value is no text or empty"),
    "task.jsonl": (b'{"text": "a", "task": ["b"]}\n' * 20, "a value is no text or empty"),
    "objects.jsonl": (b'{"text": "a", "objects": "cat"}\n' * 20, "objects is not a list"),
    "include.jsonl": (b'{"text": "a", "include": [3]}\n' * 20, "include is not a list"),
    "second.jsonl": (b'{"text": "a"}\n{"text": }\n' * 20, "line 2 is no JSON"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1"),
    "digits.jsonl": (b'{"text": ' + b"9" * 10_000 + b"}\n", "line 1"),
    "nul.jsonl": (b"\x00\x00\n" * 20, "line 1 is no JSON"),
}
_SOURCES = {
    "": "prompts.source=",
    "shapes:three": "is no prompt source",
    "no.txt": "there is no such file",
    "no.jsonl": "there is no such file",
    ".txt": "there is no such file",
    "hf:": "there is no dataset",
    "hf:no/such/folder": "there is no such folder",
    "hf:./nowhere": "there is no such folder",
    "hf:a/b?colum=text": "colum is no option",
    "hf:a/b?window=0": "window=0",
    "hf:a/b?window=x": "window=x",
    "hf:a/b?split": "write options as",
    "module:": "is not known",
    ":function": "is not known",
    "no.such.module:function": "no module",
    "malformed_syntax:function": "SyntaxError",
    "malformed_missing:function": "ModuleNotFoundError",
    "python:given": "was given to the run in Python",
}


def prompts() -> list[Case]:
    """Sources of prompts: names, functions, files; of training and of evaluations."""

    def source(name: str, value: str, says: str, field: str = "prompts.source") -> Case:
        def given(place: Place) -> list[str]:
            write_modules(place)
            return [f"--{field}={value}"]

        return Case(name, given, says)

    found = [source(f"source {value!r}", value, says) for value, says in _SOURCES.items()]
    found += [source(f"function {name}", f"{HERE}:{name}", says) for name, says in _FUNCTIONS.items()]
    found += [
        Case(f"file {name}", writes(name, content, "--prompts.source", "@"), says)
        for name, (content, says) in _FILES.items()
    ]
    for name in ("latin.txt", "text.jsonl", "empty.txt"):
        content, says = _FILES[name]
        found.append(Case(f"evaluation {name}", writes(name, content, "--evaluation.prompts", "@"), says))
    for value in ("no.txt", f"{HERE}:returns_none", "shapes:three"):
        found.append(source(f"evaluation {value}", value, "evaluation.prompts=", "evaluation.prompts"))
    return found

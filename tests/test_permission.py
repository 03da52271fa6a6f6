"""What a config may name: nothing else is called, and a dry run imports nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlcm_fast import plug_in
from rlcm_fast.config import RewardConfig
from rlcm_fast.pairs import check_source
from rlcm_fast.plugins import check_unimported, load_class
from rlcm_fast.prompts import check_prompts, load_prompts
from rlcm_fast.rewards import build_reward, check_reward
from rlcm_fast.train import main
from rlcm_fast.trajectory import Prompt

MARKER = "was_called"  # a file that the code of a stranger makes

MODULE = f'''
from pathlib import Path
from rlcm_fast import plug_in

Path("was_imported").touch()

def unmarked(*images, **arguments):
    Path("{MARKER}").touch()
    return ["a cat"]

class Unmarked:
    def __init__(self, **arguments):
        Path("{MARKER}").touch()
    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

class Scoped(Unmarked):
    scope = "image"

class Strange(Unmarked):
    scope = "pixel"

@plug_in
def texts():
    return ["a cat", "a dog"]

@plug_in
def brightness(images, texts, factor=1.0):
    assert isinstance(texts[0], str)
    return [factor * float(image.mean()) for image in images]

def by_attribute(images, texts):
    return images.mean(dim=(1, 2, 3))

by_attribute.rlcm_fast_plug_in = True
an_instance = Scoped()
Path("{MARKER}").unlink()
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the module strange_module, which leaves a file when it is imported."""
    (tmp_path / "strange_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_module", raising=False)
    return tmp_path


LIBRARY = ("os:system", "subprocess:run", "subprocess:Popen", "builtins:eval", "pathlib:Path.cwd", "code:interact")
OTHERS = (
    "strange_module:unmarked",
    "strange_module:Unmarked",
    "strange_module:Strange",
    "strange_module:Path.unlink",
    "strange_module:Scoped.__init__",
    "torch:load",
    "torch.hub:load",
    "numpy:save",
    "rlcm_fast.train:main",
)


@pytest.mark.parametrize("name", [*LIBRARY, *OTHERS])
def test_what_was_not_made_to_be_named_is_called_by_no_field(name: str, folder: Path):
    arguments = {"command": f"touch {MARKER}"}
    for call in (
        lambda: build_reward(name, arguments),
        lambda: check_reward(RewardConfig(name, arguments=arguments), "rewards[0]", must_run=True),
        lambda: build_reward("diversity", {"embedding": name, "embedding_arguments": arguments}),
        lambda: build_reward("distribution_parity", {"classifier": name, "classifier_arguments": arguments}),
        lambda: load_prompts(name),
        lambda: check_source(name),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert "does not say that a config may name it" in str(error.value) or "holds no plug-ins" in str(error.value)
    assert not (folder / MARKER).exists()


@pytest.mark.parametrize("name", LIBRARY)
def test_modules_of_python_are_refused_before_they_are_imported(name: str):
    with pytest.raises(ValueError, match="of Python's own library, which holds no plug-ins; name a class of yours"):
        load_class(name, field="reward")


def test_a_module_of_yours_may_have_a_name_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "chunk.py").write_text("class Mine:\n    scope = 'image'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "chunk", raising=False)
    assert load_class("chunk:Mine").scope == "image"
    monkeypatch.delitem(sys.modules, "chunk")


def test_a_marked_function_scores_images_and_gets_its_arguments(folder: Path):
    images = torch.full((2, 3, 4, 4), 0.5)
    prompts = [Prompt("a cat"), Prompt("a dog")]
    reward = build_reward("strange_module:brightness", {"factor": 4.0})
    assert reward(images, prompts).tolist() == [2.0, 2.0]
    assert build_reward("strange_module:by_attribute", {})(images, prompts).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"is called as brightness\(images, texts, \*\*arguments\), and .* 'power'"):
        build_reward("strange_module:brightness", {"power": 2})
    assert [prompt.text for prompt in load_prompts("strange_module:texts")] == ["a cat", "a dog"]


def test_a_class_with_a_scope_needs_no_mark_and_an_object_is_none(folder: Path):
    assert build_reward("strange_module:Scoped", {}).scope == "image"
    (folder / MARKER).unlink()
    with pytest.raises(ValueError, match="does not say that a config may name it"):
        load_class("strange_module:an_instance")
    assert not (folder / MARKER).exists()


def test_a_mark_leaves_functions_and_classes_as_they_are():
    def function() -> int:
        return 3

    class Class:
        pass

    assert plug_in(function) is function
    assert (function(), plug_in(Class)) == (3, Class)


def test_a_dry_run_imports_and_calls_nothing_and_names_what_a_run_would_import(
    folder: Path, tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]
):
    rewards = "[{name: strange_module:brightness}, {name: diversity, arguments: {embedding: strange_module:Scoped}}]"
    options = ["--dry_run", "--model.path", tiny_lcm_folder, "--prompts.source", "strange_module:texts"]
    options += ["--pretraining.weight=1", "--pretraining.data=strange_module:texts"]
    assert main([*options, "--rewards", rewards]) == 0
    printed = capsys.readouterr().out
    place = f"a run imports strange_module of {folder}/strange_module.py"
    for field in ("rewards[0]", "rewards[1]", "prompts.source", "pretraining.data"):
        assert f"# {field}: {place}" in printed
    assert not (folder / "was_imported").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("strange_module:Scopd", "strange_module has no Scopd; it has Path, Scoped, Strange"),
        ("strange_module:unmarked", "does not say that a config may name it, so it is not called; if it is yours"),
        ("strange_module:Unmarked", "does not say that a config may name it"),
        ("nowhere:Thing", "no module nowhere; install its package"),
        ("strange_module.below:Thing", "no module strange_module.below"),
        ("os:system", "holds no plug-ins"),
        ("my reward:Thing", "is no name of Python"),
        ("broken:Thing", "broken.py is no Python (invalid syntax"),
    ],
)
def test_a_dry_run_sees_mistakes_in_the_source(folder: Path, name: str, message: str):
    (folder / "broken.py").write_text("class :\n")
    with pytest.raises(ValueError) as error:
        check_unimported(name, {}, "rewards[0].name")
    assert message in str(error.value)
    assert str(error.value).startswith(f"rewards[0].name={name}")
    assert not (folder / "was_imported").exists()


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import *",
        "def __getattr__(name): ...",
        "globals().update(Thing=1)",
        "from a import b as Thing",
        "try:\n    from a import Thing\nexcept ImportError:\n    class Thing: pass\n",
        "import a\nThing = a.make()",
        "class Thing(Base): pass",
        "@decorated\nclass Thing: pass",
        "class Thing: pass\nThing.scope = 'image'",
        "for name in ('Thing',):\n    globals()[name] = 1",
    ],
)
def test_a_dry_run_leaves_to_the_run_what_only_an_import_shows(folder: Path, source: str):
    (folder / "dynamic.py").write_text(source)
    assert check_unimported("dynamic:Thing", {}, "name") == f"dynamic of {folder / 'dynamic.py'}"


def test_packages_are_found_without_an_import(folder: Path):
    for place in ("package", "spaces/inner"):
        (folder / place).mkdir(parents=True)
        (folder / place / "rewards.py").write_text("class Thing:\n    scope = 'image'\n")
    (folder / "package" / "__init__.py").write_text("raise RuntimeError\n")
    assert check_unimported("package.rewards:Thing", {}, "name") == f"package.rewards of {folder}/package/rewards.py"
    found = check_unimported("spaces.inner.rewards:Thing", {}, "name")
    assert found == f"spaces.inner.rewards of {folder}/spaces/inner/rewards.py"
    assert check_prompts("shapes:one") is None

"""Imports packages of the optional installs when a reward needs them, with one line that names the install."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType
from typing import Any, ClassVar

from rlcm_fast.rewards.models import ModelFiles, OnModels


class OnPackage(OnModels):
    """The base of rewards whose weights come inside a package of an extra."""

    PACKAGE: ClassVar[tuple[str, str]]  # the module and the distribution

    @classmethod
    def files(cls, arguments: Any) -> list[ModelFiles]:
        """No files of their own; raises ValueError if the package is missing."""
        assert cls.FACTS is not None
        require(cls.PACKAGE[0], cls.FACTS.extra)
        return []

    @property
    def used(self) -> dict[str, Any]:
        """The version of the package, which fixes the weights."""
        return {"package": f"{self.PACKAGE[1]} {importlib.metadata.version(self.PACKAGE[1])}"}


def require(module: str, extra: str) -> ModuleType:
    """Returns the imported `module`; raises a ValueError that says how to install `extra` if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ValueError(f"it needs the package {name} ({error}); pip install 'rlcm_fast[{extra}]'") from error

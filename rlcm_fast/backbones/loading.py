"""Where a model's folder is. Light at import: the doors resolve a path before they import torch."""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = {
    name: Path(__file__).resolve().parent.parent / "shapes" / "models" / name.partition("/")[2]
    for name in ("shapes/lcm", "shapes/teacher")
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_INDEX = "model_index.json"


def resolve_model_path(path: str, field: str = "model.path") -> str:
    """What diffusers' `from_pretrained` takes: the folder of a shipped model, a folder that exists, or a hub id.

    Raises ValueError for what can be none of these; whether a hub id exists is known only when it is loaded.
    Errors name `field`.
    """
    folder = SHIPPED.get(path, Path(path).expanduser())
    if (folder / _INDEX).is_file():
        return str(folder)
    if path in SHIPPED:
        raise ValueError(f"{field}={path} did not come with this installation ({folder}); install rlcm_fast anew")
    if folder.is_dir():
        raise ValueError(f"{field}={path} is no diffusers folder: it has no {_INDEX}; {_remedy(folder)}")
    owner, slash, _ = path.partition("/")
    if not _HUB_ID.fullmatch(path) or (
        slash and Path(owner).is_dir()
    ):  # runs/typo is no hub id where runs/ is a folder
        shipped = " or ".join(SHIPPED)
        raise ValueError(f"{field}={path} is not there; give a diffusers folder, a hub id, {shipped}")
    return path


def _remedy(folder: Path) -> str:
    below = sorted(index.parent for index in folder.glob(f"*/{_INDEX}"))
    return f"give {below[0]}" if below else "give the export/ folder of a run, or a pipeline saved by diffusers"

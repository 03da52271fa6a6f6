"""What other_tools.py runs in InvokeAI's environment: asks its model probe what each file is, and prints JSON.

    python invokeai_probe.py FILE ...

The probe's imports reach torchvision, whose compiled operators are not there where torch is the CPU's build; the probe
computes nothing with them, so their names are declared first.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch


def declare_operators() -> torch.library.Library:
    """Declares the operators for which torchvision registers shapes when it is imported."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', text))):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def main() -> None:
    library = declare_operators()
    from invokeai.backend.model_manager.configs.factory import (  # pyright: ignore[reportMissingImports]
        ModelConfigFactory,
    )

    found = {}
    for file in sys.argv[1:]:
        # The hash of a whole file says nothing of what it is, and reads all of it.
        config = ModelConfigFactory.from_model_on_disk(file, override_fields={"hash": "left out"}).config
        fields = ("base", "type", "format", "variant", "prediction_type")
        described = {name: getattr(config, name) for name in fields if hasattr(config, name)}
        named = {name: getattr(value, "value", value) for name, value in described.items()}
        found[Path(file).name] = {"config": type(config).__name__, **named}
    print(json.dumps(found))
    del library


if __name__ == "__main__":
    main()

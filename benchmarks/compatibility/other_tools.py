"""Opens our checkpoints and LoRAs in other tools, each in an environment of its own, and compares what they draw.

    python benchmarks/compatibility/other_tools.py --out benchmarks/results/other_tools.json

The model is a full-size Stable Diffusion 1.5 with random weights and a LoRA (alpha twice the rank) on its attention,
both written by the code behind `rlcm-fast export`. Nothing is downloaded but the tools. Then

  - stable-diffusion.cpp loads the checkpoint and the LoRA; its log names every tensor that it misses, does not know,
    or does not use. It draws with and without the LoRA, with Euler's sampler at given sigmas and its RNG "cpu", which
    gives torch's numbers. diffusers reads the same file (`from_single_file`) and draws the same in float32. As a scale
    for the difference serves what the LoRA, and another prompt, change.
  - InvokeAI's model probe says what the files are; also files of SDXL's names and shapes, all zeros, without space on
    the disk.

It needs a C++ compiler, about 12 GB of memory and 15 GB of disk; an environment is kept in --environments and used
again. Exits with code 1 if a tool misses a key, takes a file for something else, or draws another image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.shared.reporting import print_summary
from rlcm_fast.backbones.adapters import add_adapters, save_adapters
from rlcm_fast.backbones.file_kinds import LAYOUTS
from rlcm_fast.backbones.lora_layouts import KOHYA_FILE, LoraLayer, write_kohya
from rlcm_fast.backbones.single_file import tokenizers
from rlcm_fast.backbones.single_file_writing import file_tensors, modelspec, save_single_file
from rlcm_fast.config import LoraConfig

Levels = NDArray[np.float64]  # (H, W, 3) in [0, 255]

CLIENTS = Path(__file__).parent / "clients"
PROMPTS = ("a red circle on a blue square", "two green stars")
SEED, SIZE = 3, 64
TIMESTEPS = (999, 499)
TEXT_GAIN = 4.0  # of the weights that read the text, so that a prompt changes the image of a random model
MAX_SHARE = 0.1  # of what the LoRA changes, that the tools' images may differ by
EXPECTED = {
    "full_size.safetensors": ("sd-1", "main"),
    KOHYA_FILE: ("sd-1", "lora"),
    "full_size_sdxl.safetensors": ("sdxl", "main"),
    "sdxl_lora.safetensors": ("sdxl", "lora"),
}
IMPORTS_OF_THE_PROBE = [
    *("torch==2.13.0", "diffusers==0.40.0", "transformers>=5.5,<5.6", "numpy<2", "accelerate", "blake3", "compel"),
    *("einops", "fastapi", "gguf", "onnxruntime", "opencv-contrib-python-headless", "picklescan", "psutil"),
    *("pydantic-settings", "python-multipart", "requests", "semver"),
]
PACKAGES = {
    "stable-diffusion.cpp": (["stable-diffusion-cpp-python==0.4.7", "numpy", "pillow"], []),
    "InvokeAI": (
        IMPORTS_OF_THE_PROBE,
        ["invokeai==6.14.2", "torchvision==0.28.0", "spandrel", "deprecated", "wrapt"],  # without dependencies
    ),
}


@dataclass(frozen=True)
class Tool:
    """A tool in an environment of its own."""

    name: str
    python: Path

    @classmethod
    def installed(cls, name: str, environments: Path) -> Tool:
        """Makes the environment unless it is there whole."""
        folder = environments / name
        tool, mark = cls(name, folder / "bin" / "python"), folder / "installed"
        if not mark.is_file():
            venv.create(folder, with_pip=True)
            packages, alone = PACKAGES[name]
            tool._install(packages)
            if alone:
                tool._install(["--no-deps", *alone])
            mark.touch()
        return tool

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": "", "INVOKEAI_ROOT": tempfile.gettempdir()}
        command = [str(self.python), str(CLIENTS / script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def versions(self) -> dict[str, str]:
        listed = subprocess.run(
            [str(self.python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
        )
        wanted = {"invokeai", "stable_diffusion_cpp_python", "torch", "diffusers"}
        named = {entry["name"].lower().replace("-", "_"): entry["version"] for entry in json.loads(listed.stdout)}
        return {name: version for name, version in named.items() if name in wanted}

    def _install(self, packages: Sequence[str]) -> None:
        subprocess.run([str(self.python), "-m", "pip", "install", *packages], check=True)


def main() -> int:
    # Make the tools and the files.
    arguments = parse_arguments()
    tools = [Tool.installed(name, arguments.environments) for name in PACKAGES]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        checkpoint, lora = write_files(folder)
        print(f"wrote {checkpoint.stat().st_size / 2**30:.2f} GiB and a LoRA", file=sys.stderr)

        # Open them with both.
        report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": {
                "here": {"diffusers": diffusers.__version__, "torch": torch.__version__},
                **{tool.name: tool.versions() for tool in tools},
            },
            "stable-diffusion.cpp": in_stable_diffusion_cpp(tools[0], checkpoint, lora, folder),
            "InvokeAI": in_invokeai(tools[1], checkpoint, lora, folder),
        }
    report["faults"] = faults_of(report)
    print_summary(report, arguments.out)
    return 1 if report["faults"] else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--environments", type=Path, default=Path("environments"), help="folder of the tools")
    parser.add_argument("--scratch", type=Path, help="folder for files of 4 GB; default: the system's temporary one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def write_files(folder: Path) -> tuple[Path, Path]:
    """Writes a full-size checkpoint in float16 and a LoRA for it, as an export does."""
    pipeline = random_pipeline()
    checkpoint = folder / "full_size.safetensors"
    save_single_file(pipeline, checkpoint, torch.float16, guidance_scale=1.0)
    torch.manual_seed(1)
    add_adapters(pipeline.unet, LoraConfig(rank=4, alpha=8.0))
    weights = {name: weight for name, weight in pipeline.unet.named_parameters() if ".lora_" in name}
    for name, weight in weights.items():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.02)
    save_adapters(pipeline.unet, weights, pipeline, folder)
    return checkpoint, folder / KOHYA_FILE


def random_pipeline() -> Any:
    """Returns Stable Diffusion 1.5 with random weights, of which those that read the text are larger than usual."""
    layout = str(LAYOUTS / "sd15")
    torch.manual_seed(0)
    unet_config: Any = UNet2DConditionModel.load_config(layout, subfolder="unet")
    vae_config: Any = AutoencoderKL.load_config(layout, subfolder="vae")
    unet: Any = UNet2DConditionModel.from_config(unet_config)
    for name, weight in unet.named_parameters():
        if ".attn2." in name:
            weight.data.mul_(TEXT_GAIN)
    cls: Any = StableDiffusionPipeline  # its annotations name an enumeration
    return cls(
        unet=unet,
        vae=AutoencoderKL.from_config(vae_config),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(layout, subfolder="text_encoder")),
        tokenizer=tokenizers("sd15")["tokenizer"],
        scheduler=DDIMScheduler.from_pretrained(layout, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def in_stable_diffusion_cpp(tool: Tool, checkpoint: Path, lora: Path, folder: Path) -> dict[str, Any]:
    """Returns what its log says of tensors, and how far its images are from diffusers'."""
    # Draw with the tool: as it is, with the LoRA, another prompt.
    sigmas = sigmas_of_timesteps()
    prompts = {"plain": PROMPTS[0], "with LoRA": f"{PROMPTS[0]}<lora:{lora}:1>", "other prompt": PROMPTS[1]}
    files = {name: folder / f"{name.replace(' ', '_')}.png" for name in prompts}
    drawings = [{"prompt": prompts[name], "out": str(file)} for name, file in files.items()]
    request = {"checkpoint": str(checkpoint), "seed": SEED, "size": SIZE, "sigmas": sigmas}
    (folder / "request.json").write_text(json.dumps({**request, "drawings": drawings}), encoding="utf-8")
    ran = tool.run("sd_cpp_images.py", str(folder / "request.json"))
    log = ran.stdout + ran.stderr
    if ran.returncode != 0 or not all(file.is_file() for file in files.values()):
        return {"failed": log[-2000:]}

    # Draw the same with diffusers, and compare.
    expected = drawn_by_diffusers(checkpoint, lora, sigmas)
    theirs = {name: levels(Image.open(file)) for name, file in files.items()}
    return {
        "tensors_missing": re.findall(r"tensor '(\S+)' not in model file", log),
        "tensors_unknown": re.findall(r"unknown tensor '(.+?)' in model file", log),
        "lora_tensors_unused": re.findall(r"unused lora tensor \|(\S+)\|", log),
        "lora_tensors_applied": sorted(set(re.findall(r"\((\d+ / \d+)\) LoRA tensors have been applied", log))),
        "version_it_sees": re.findall(r"Version: (.+?)\s*$", log, re.MULTILINE)[:1],
        "unit": "mean absolute difference of pixels, in levels of 255",
        "differs_from_diffusers": {name: distance(theirs[name], expected[name]) for name in theirs},
        "lora_changes": distance(expected["with LoRA"], expected["plain"]),
        "other_prompt_changes": distance(expected["other prompt"], expected["plain"]),
        "contrast": float(expected["plain"].std()),
    }


def sigmas_of_timesteps() -> list[float]:
    """Returns Euler's sigmas sqrt((1 - alpha_bar) / alpha_bar) of the timesteps, and the 0 at which it ends."""
    scheduler: Any = EulerDiscreteScheduler.from_pretrained(str(LAYOUTS / "sd15"), subfolder="scheduler")
    alpha_bar = scheduler.alphas_cumprod
    return [*(((1 - alpha_bar[t]) / alpha_bar[t]).sqrt().item() for t in TIMESTEPS), 0.0]


def drawn_by_diffusers(checkpoint: Path, lora: Path, sigmas: Sequence[float]) -> dict[str, Levels]:
    """Draws the three images in float32 with the pipeline that diffusers makes of the files themselves."""
    layout = str(LAYOUTS / "sd15")
    scheduler: Any = EulerDiscreteScheduler.from_pretrained(layout, subfolder="scheduler", timestep_spacing="linspace")
    cls: Any = StableDiffusionPipeline
    pipeline = cls.from_single_file(
        str(checkpoint),
        config=layout,
        local_files_only=True,
        tokenizer=tokenizers("sd15")["tokenizer"],
        scheduler=scheduler,
        safety_checker=None,
    )

    def drawn(prompt: str) -> Levels:
        settings = {"width": SIZE, "height": SIZE, "sigmas": list(sigmas), "guidance_scale": 1.0}
        return levels(pipeline(prompt, generator=torch.Generator().manual_seed(SEED), **settings).images[0])

    found = {"plain": drawn(PROMPTS[0]), "other prompt": drawn(PROMPTS[1])}
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return {**found, "with LoRA": drawn(PROMPTS[0])}


def levels(image: Image.Image) -> Levels:
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def distance(one: Levels, other: Levels) -> float:
    return float(np.abs(one - other).mean())


def in_invokeai(tool: Tool, checkpoint: Path, lora: Path, folder: Path) -> dict[str, Any]:
    """Returns what its probe takes the files for."""
    sdxl = [write_hollow_sdxl(folder / "full_size_sdxl.safetensors"), write_hollow_sdxl_lora(folder / "sdxl_lora")]
    ran = tool.run("invokeai_probe.py", *map(str, [checkpoint, lora, *sdxl]))
    return json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {"failed": ran.stderr[-2000:]}


def write_hollow_sdxl(file: Path) -> Path:
    """Writes the names and shapes of a full-size SDXL checkpoint; the weights are a hole in the file: zeros."""
    layout = str(LAYOUTS / "sdxl")
    unet_config: Any = UNet2DConditionModel.load_config(layout, subfolder="unet")
    vae_config: Any = AutoencoderKL.load_config(layout, subfolder="vae")
    cls: Any = StableDiffusionXLPipeline
    with torch.device("meta"):
        pipeline = cls(
            unet=UNet2DConditionModel.from_config(unet_config),
            vae=AutoencoderKL.from_config(vae_config),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(layout, subfolder="text_encoder")),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(layout, subfolder="text_encoder_2")
            ),
            **tokenizers("sdxl"),
            scheduler=DDIMScheduler(),
        )
    header: dict[str, Any] = {"__metadata__": modelspec(pipeline)}
    end = 0
    for name, weight in file_tensors(pipeline, guidance_scale=1.0).items():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "F16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        content.truncate(8 + len(text) + end)
    return file


def write_hollow_sdxl_lora(folder: Path) -> Path:
    """Writes a LoRA of zeros on all attention of a full-size SDXL, as an export does."""
    config: Any = UNet2DConditionModel.load_config(str(LAYOUTS / "sdxl"), subfolder="unet")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(LoraConfig().targets)) and isinstance(module, nn.Linear):
            layers[name] = LoraLayer(torch.zeros(4, module.in_features), torch.zeros(module.out_features, 4), 8.0)
    folder.mkdir()
    write_kohya(folder / "sdxl_lora.safetensors", layers, unet.config)
    return folder / "sdxl_lora.safetensors"


def faults_of(report: Mapping[str, Any]) -> list[str]:
    """Returns what is not as it should be."""
    drawn, probed = report["stable-diffusion.cpp"], report["InvokeAI"]
    faults = [f"{name} failed" for name in PACKAGES if "failed" in report[name]]
    if "failed" not in drawn:
        for kind in ("tensors_missing", "tensors_unknown", "lora_tensors_unused"):
            faults += [f"stable-diffusion.cpp: {kind}: {name}" for name in drawn[kind]]
        for name, difference in drawn["differs_from_diffusers"].items():
            if difference > MAX_SHARE * min(drawn["lora_changes"], drawn["other_prompt_changes"]):
                faults.append(f"stable-diffusion.cpp: the image {name} differs by {difference:.3f}")
    for file, (base, kind) in EXPECTED.items():
        found = probed.get(file, {})
        if "failed" not in probed and (found.get("base"), found.get("type")) != (base, kind):
            faults.append(f"InvokeAI takes {file} for {found}")
    return faults


if __name__ == "__main__":
    sys.exit(main())

"""What other_tools.py runs in stable-diffusion.cpp's environment: loads a checkpoint, draws images with it.

    python sd_cpp_images.py REQUEST.json

The request: {checkpoint, seed, size, sigmas, drawings: [{prompt, out}]}; a prompt names a LoRA as <lora:/its/path:1>.
The tool prints what it loads, and which tensors it misses, does not know, or does not use, to stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stable_diffusion_cpp import StableDiffusion  # pyright: ignore[reportMissingImports]  # of another environment


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Its RNG "cpu" gives the numbers of torch's CPU generator.
    tool = StableDiffusion(
        model_path=request["checkpoint"],
        rng_type="cpu",
        sampler_rng_type="cpu",
        vae_decode_only=True,
        lora_apply_mode="immediately",
        n_threads=2,
        verbose=True,
    )
    for drawing in request["drawings"]:
        images = tool.generate_image(
            prompt=drawing["prompt"],
            width=request["size"],
            height=request["size"],
            cfg_scale=1.0,
            sample_method="euler",
            sample_steps=len(request["sigmas"]) - 1,
            sigmas=",".join(map(str, request["sigmas"])),
            seed=request["seed"],
        )
        images[0].save(drawing["out"])


if __name__ == "__main__":
    main()

"""Random folders, drawn over the fields that stock pipelines read: obeyed as they do, or refused in one line.

A folder has random weights; its configs differ from those of the tiny folders in a few fields at a time. Encodings,
images and the whole sampling are held against the pipeline that diffusers loads from the same folder.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig, PolicyConfig
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.trajectory import Prompt

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two stars " * 12]  # the second one is cut at 20 or 32 tokens
MAX_IMAGE_DIFFERENCE = 2e-5  # on [0, 1]
Fields = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning")

SCHEDULERS = {
    "lcm": ["LCMScheduler"],
    "sd": ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler", "LCMScheduler"],
    "sdxl": ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "TCDScheduler", "LCMScheduler"],
}
CHOICES: dict[str, dict[str, list[Any]]] = {  # usual values come first
    "scheduler/scheduler_config.json": {
        "beta_start": [0.00085, 0.0001, 0.002],
        "beta_end": [0.012, 0.02],
        "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
        "num_train_timesteps": [1000, 600],
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "steps_offset": [1, 0, 3],
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [False, True],
        "clip_sample": [False, True],
        "thresholding": [False, True],
        "original_inference_steps": [50, 20],
        "timestep_scaling": [10.0, 3.0],
        "use_karras_sigmas": [False, True],
        "use_exponential_sigmas": [False, True],
        "use_beta_sigmas": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "sigma_max": [None, 9.0],
        "trained_betas": [None, [0.01] * 1000],
        "variance_type": [None, "fixed_large"],
        "dynamic_thresholding_ratio": [0.995, 0.5],
        "clip_sample_range": [1.0, 2.0],
    },
    "vae/config.json": {
        "scaling_factor": [0.18215, 0.13025, 0.5],
        "shift_factor": [None, 0.0, 0.1],
        "latents_mean": [None, [0.3, -0.2, 0.1, 0.0]],
        "latents_std": [None, [1.5, 0.7, 1.0, 2.0]],
        "force_upcast": [True, False],
        "act_fn": ["silu", "relu"],
    },
    "unet/config.json": {
        "sample_size": [8, [8, 4]],
        "in_channels": [4, 9],
        "center_input_sample": [False, True],
        "flip_sin_to_cos": [True, False],
        "freq_shift": [0, 1],
        "act_fn": ["silu", "gelu"],
        "norm_eps": [1e-5, 1e-3],
        "mid_block_scale_factor": [1, 2.0],
        "resnet_time_scale_shift": ["default"],
        "upcast_attention": [False, True],
    },
    "text_encoder/config.json": {
        "hidden_act": ["quick_gelu", "gelu"],
        "use_attention_mask": [False, True],
        "layer_norm_eps": [1e-5, 1e-3],
        "eos_token_id": [73, 2],
        "attention_dropout": [0.0, 0.5],
        "pad_token_id": [73, 1],
        "bos_token_id": [72, 0],
    },
    "text_encoder_2/config.json": {"hidden_act": ["quick_gelu", "gelu"], "eos_token_id": [73, 2]},
    "tokenizer/tokenizer_config.json": {
        "model_max_length": [32, 20],
        "padding_side": ["right", "left"],
        "truncation_side": ["right", "left"],
        "do_lower_case": [True, False],
        "add_prefix_space": [False, True],
        "pad_token": ["<|endoftext|>", "a"],
        "unk_token": ["<|endoftext|>", "b"],
    },
    "model_index.json": {"force_zeros_for_empty_prompt": [True, False], "add_watermarker": [None, True]},
}


@st.composite
def folders(draw: st.DrawFn) -> tuple[str, str, dict[str, Fields], Fields]:
    """Draws the kind of pipeline, the scheduler's class, fields by file, and settings of the policy."""
    kind = draw(st.sampled_from(sorted(SCHEDULERS)))
    changes: dict[str, Fields] = {}
    fields = [(file, key) for file, keys in CHOICES.items() for key in keys]
    for file, key in draw(st.lists(st.sampled_from(fields), max_size=6, unique=True)):
        changes.setdefault(file, {})[key] = draw(st.sampled_from(CHOICES[file][key]))
    if draw(st.booleans()) and "latents_std" in changes.get("vae/config.json", {}):
        changes["vae/config.json"]["latents_mean"] = [0.3, -0.2, 0.1, 0.0]
    scheduler = draw(st.sampled_from(SCHEDULERS[kind]))
    of_scheduler = changes.get("scheduler/scheduler_config.json", {})
    assume(
        scheduler != "EulerAncestralDiscreteScheduler" or of_scheduler.get("prediction_type") != "sample"
    )  # ours only
    guidance = draw(st.sampled_from([1.0, 2.5]))
    return kind, scheduler, changes, {"num_steps": draw(st.integers(1, 4)), "guidance_scale": guidance}


def write(folder: Path, scheduler: str, changes: dict[str, Fields]) -> None:
    """Makes the drawn folder of a tiny one."""
    for file, fields in {"scheduler/scheduler_config.json": {}, **changes}.items():
        path = folder / file
        if path.is_file():
            own = {"_class_name": scheduler, "clip_sample": False} if file.startswith("scheduler") else {}
            path.write_text(json.dumps(json.loads(path.read_text()) | own | fields))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", scheduler]}))


def eta_of(policy: GaussianPolicy, backbone: Backbone) -> float:
    """Noise of the steps; DDIM's last step has it in diffusers and never here, if set_alpha_to_one is false."""
    has_last = policy.schedule.kind == "ddim" and not backbone.scheduler_config.get("set_alpha_to_one", True)
    return 0.0 if has_last else 0.6


def load(folder: Path, chosen: Fields) -> tuple[Backbone, GaussianPolicy, float] | None:
    """Returns the backbone, the policy and its eta; None if the folder is refused, which must take one line."""
    try:
        backbone = Backbone.load(ModelConfig(str(folder)), CPU, torch.float32, "auto")
        unet: Any = backbone.unet

        def policy_of(eta: float) -> GaussianPolicy:
            network = Network(unet, unet.config)
            return build_policy(PolicyConfig(**chosen, eta=eta), network, backbone.scheduler_config)

        eta = eta_of(policy_of(0.6), backbone)
        return backbone, policy_of(eta), eta
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and any(
            mark in message for mark in ("could not be loaded: ", "scheduler config", "policy.")
        )
        event(f"refused: {message.rpartition('could not be loaded: ')[2][:40]}")
        return None


def assert_conforms(folder: Path, chosen: Fields) -> bool:
    """Compares encode, decode and the whole sampling with stock; returns False if the folder is refused."""
    # Load both.
    ours = load(folder, chosen)
    if ours is None:
        return False
    backbone, policy, eta = ours
    stock: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    height, width = backbone.image_size

    # Compare the encodings.
    conditioning = backbone.encode([Prompt(text) for text in TEXTS], with_negative=True)
    with torch.no_grad():
        expected = stock.encode_prompt(TEXTS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(conditioning.embeds, expected[0], atol=1e-5, rtol=1e-5)
    if conditioning.pooled is not None:
        torch.testing.assert_close(conditioning.pooled, expected[2], atol=1e-5, rtol=1e-5)
    assert conditioning.negative_embeds is not None
    torch.testing.assert_close(conditioning.negative_embeds, expected[1][:1], atol=1e-5, rtol=1e-5)

    # Compare whole samplings, decoded.
    takes_eta = policy.schedule.kind in ("ddim", "tcd")
    images = stock(
        TEXTS,
        height=height,
        width=width,
        num_inference_steps=policy.num_steps,
        guidance_scale=policy.guidance_scale,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
        **({"eta": eta} if takes_eta else {}),
    ).images
    with torch.no_grad():
        _, x_0 = policy.sample(conditioning, torch.Generator().manual_seed(7))
    difference = (backbone.decode(x_0) - images).abs().max().item()
    assert difference < MAX_IMAGE_DIFFERENCE, f"maximum difference {difference:.1e}"
    return True


@pytest.fixture
def check(
    tiny_lcm_folder: str, tiny_sd_folder: str, tiny_sdxl_folder: str, tmp_path: Path
) -> Callable[[tuple[str, str, dict[str, Fields], Fields]], bool]:
    tiny = {"lcm": tiny_lcm_folder, "sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder}

    def run(drawn: tuple[str, str, dict[str, Fields], Fields]) -> bool:
        kind, scheduler, changes, chosen = drawn
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = Path(shutil.copytree(tiny[kind], tmp_path / "model"))
        write(folder, scheduler, changes)
        return assert_conforms(folder, chosen)

    return run


@pytest.fixture
def counts() -> Iterator[Counter[str]]:
    """Counts outcomes, and prints them for docs/reliability.md."""
    found: Counter[str] = Counter()
    yield found
    print(f"\n{found.total()} folders: {dict(found)}")


SHARED = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow], "database": None}


@settings(max_examples=10, **SHARED)
@given(folders())
def test_random_folders_are_obeyed_as_by_the_stock_pipeline_or_refused(check: Any, drawn: Any):
    check(drawn)


@pytest.mark.slow
@settings(max_examples=400, **SHARED)
@given(folders())
def test_many_random_folders_are_obeyed_as_by_the_stock_pipeline_or_refused(check: Any, counts: Any, drawn: Any):
    counts["equal" if check(drawn) else "refused"] += 1


STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0], "scaling_factor": 0.5}


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_each_kind_of_pipeline_conforms(check: Any, kind: str):
    vae = STATISTICS if kind == "sdxl" else {}
    assert check((kind, SCHEDULERS[kind][0], {"vae/config.json": vae}, {"num_steps": 3, "guidance_scale": 2.5}))

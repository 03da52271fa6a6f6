"""A patched diffusers model against itself unpatched: outputs, gradients, keys, files, and the way back."""

# N rows, C H W latent, L tokens, E embedding

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rlcm_fast.kernels import dispatch
from rlcm_fast.kernels.patch import GroupNormSiLU, fuse_group_norm_silu


@pytest.fixture
def unet(tiny_lcm_folder: str) -> UNet2DConditionModel:
    """Of random weights, those of the norms too, which begin as ones and zeros."""
    model = UNet2DConditionModel.from_pretrained(tiny_lcm_folder, subfolder="unet")
    assert isinstance(model, UNet2DConditionModel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, text, guidance embedding of the tiny model."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((num_rows, 4, 8, 8), (num_rows, 5, 24), (num_rows, 16))
    latents, text, guidance = (torch.randn(size, generator=generator) for size in sizes)
    return latents, torch.arange(num_rows) * 100 + 7, text, guidance


def run(model: UNet2DConditionModel, num_rows: int = 1) -> dict[str, Tensor]:
    """The output and the gradients of all parameters, by name."""
    latents, times, text, guidance = inputs(num_rows)
    model.zero_grad()
    output = model(latents, times, text, timestep_cond=guidance).sample
    output.square().mean().backward()
    return {"output": output.detach()} | {name: gradient(parameter) for name, parameter in model.named_parameters()}


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within 2e-5 of each tensor's largest value, or of the largest gradient's thousandth part: float32 sums."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(float(values.abs().max()) for values in theirs.values())
    for name, values in theirs.items():
        apart = (ours[name] - values).abs().max() / max(float(values.abs().max()), floor)
        assert apart < 2e-5, f"{name}: {apart}"


def submodules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """With repetitions, where two names have one module."""
    return model.named_modules(remove_duplicate=False)


def test_with_torch_a_patched_unet_is_the_unpatched_one_bit_for_bit(unet: UNet2DConditionModel):
    before = run(unet, num_rows=2)
    with dispatch.use("torch"), fuse_group_norm_silu(unet):
        patched = run(unet, num_rows=2)
    assert before.keys() == patched.keys()
    assert all(torch.equal(patched[name], values) for name, values in before.items())


def test_with_triton_outputs_and_all_gradients_agree(unet: UNet2DConditionModel):
    before = run(unet, num_rows=2)
    with dispatch.use("triton"), fuse_group_norm_silu(unet):
        assert_near(run(unet, num_rows=2), before)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["keeping", "checkpointing"])
def test_a_channels_last_unet_agrees_too(unet: UNet2DConditionModel, checkpoints: bool):
    before = run(unet)
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if checkpoints:
        unet.enable_gradient_checkpointing()
        unet.train()
    with dispatch.use("triton"), fuse_group_norm_silu(unet):
        assert_near(run(unet), before)


def test_every_resnet_block_and_the_last_norm_are_swapped_and_nothing_else(unet: UNet2DConditionModel):
    norms = {name for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm)}
    of_attention = {name for name in norms if ".attentions." in name}
    with fuse_group_norm_silu(unet):
        assert {name for name, module in unet.named_modules() if isinstance(module, GroupNormSiLU)} == (
            norms - of_attention
        )
    assert len(norms - of_attention) == 2 * sum(isinstance(module, ResnetBlock2D) for module in unet.modules()) + 1


def test_remove_puts_the_same_objects_back_and_may_be_called_again(unet: UNet2DConditionModel):
    shared = nn.SiLU()
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.nonlinearity = shared
    before, parameters = list(submodules(unet)), list(unet.named_parameters())
    handle = fuse_group_norm_silu(unet)
    same = zip(parameters, unet.named_parameters(), strict=True)
    assert all(ours is theirs and name == other for (name, ours), (other, theirs) in same)
    handle.remove()
    handle.remove()
    after = list(submodules(unet))
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(ours is theirs for (_, ours), (_, theirs) in zip(after, before, strict=True))


def test_what_happens_to_parameters_meanwhile_stays(unet: UNet2DConditionModel):
    replaced = {name: values + 1 for name, values in unet.state_dict().items()}
    with fuse_group_norm_silu(unet):
        unet.load_state_dict(replaced, assign=True)
    assert all(torch.equal(values, replaced[name]) for name, values in unet.state_dict().items())


def test_a_patched_unet_saves_the_same_files(unet: UNet2DConditionModel, tmp_path: Path):
    keys = list(unet.state_dict())
    unet.save_pretrained(tmp_path / "before")
    with fuse_group_norm_silu(unet):
        assert list(unet.state_dict()) == keys
        unet.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()


def through(vae: AutoencoderKL, latents: Tensor, images: Tensor) -> list[Tensor]:
    """Decoded latents and encoded images."""
    return [vae.decode(latents, return_dict=False)[0], vae.encode(images, return_dict=False)[0].mean]


def test_a_vae_agrees_with_both_kernels(tiny_lcm_folder: str):
    vae = AutoencoderKL.from_pretrained(tiny_lcm_folder, subfolder="vae")
    assert isinstance(vae, AutoencoderKL)
    latents, images = inputs(1)[0], torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = through(vae, latents, images)
        with fuse_group_norm_silu(vae):
            assert isinstance(vae.decoder.conv_norm_out, GroupNormSiLU)
            assert isinstance(vae.encoder.conv_norm_out, GroupNormSiLU)
            for kernels, tolerance in (("torch", 0.0), ("triton", 2e-5)):
                with dispatch.use(kernels):
                    after = through(vae, latents, images)
                torch.testing.assert_close(after, before, rtol=0, atol=tolerance)


def block(**settings: object) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, **settings)


@pytest.mark.parametrize(
    "other", [{"time_embedding_norm": "scale_shift"}, {"non_linearity": "mish"}], ids=["scale_shift", "mish"]
)
def test_a_block_that_does_something_else_stays_as_it_is(other: dict[str, str]):
    model = nn.Sequential(block(), block(**other))
    theirs = list(model[1].modules())
    with fuse_group_norm_silu(model):
        assert isinstance(model[0].norm1, GroupNormSiLU)
        assert all(ours is module for ours, module in zip(model[1].modules(), theirs, strict=True))


def test_a_model_is_patched_once_and_must_have_something_to_swap():
    model = block()
    with fuse_group_norm_silu(model), pytest.raises(ValueError, match="is already patched; call remove"):
        fuse_group_norm_silu(model)
    fuse_group_norm_silu(model).remove()
    with pytest.raises(ValueError, match="model=Sequential has no GroupNorm followed by SiLU .* give the unet or"):
        fuse_group_norm_silu(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))

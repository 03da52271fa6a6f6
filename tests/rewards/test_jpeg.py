from __future__ import annotations

from io import BytesIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlcm_fast.rewards.jpeg import JpegCompressibility, JpegIncompressibility, to_uint8
from rlcm_fast.trajectory import Prompt


def noise(num_images: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompts(num_images: int) -> list[Prompt]:
    return [Prompt("a cat")] * num_images


@pytest.mark.parametrize("quality", [1, 50, 95, 100])
def test_the_reward_is_the_size_of_the_file_that_pillow_writes(quality: int, tmp_path):
    image = noise(1)
    pixels = (image[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=quality)
    kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
    assert JpegIncompressibility(quality)(image, prompts(1)).item() == pytest.approx(kilobytes, rel=1e-6)
    assert JpegCompressibility(quality)(image, prompts(1)).item() == pytest.approx(-kilobytes, rel=1e-6)


def test_pixels_are_rounded_as_diffusers_rounds_them():
    image_processor = pytest.importorskip("diffusers.image_processor")
    images = noise(3)
    numpy = image_processor.VaeImageProcessor.pt_to_numpy(images)
    for ours, theirs in zip(to_uint8(images), image_processor.VaeImageProcessor.numpy_to_pil(numpy), strict=True):
        assert Image.fromarray(ours.numpy()).tobytes() == theirs.tobytes()


def test_values_outside_the_range_are_clamped_not_wrapped():
    images = torch.tensor([-0.2, 0.0, 1.0, 1.3]).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 0, 255, 255]


def test_a_decoded_jpeg_looks_like_the_image():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    buffer = BytesIO()
    Image.fromarray(to_uint8(ramp)[0].numpy()).save(buffer, format="JPEG", quality=95)
    decoded = torch.tensor(list(Image.open(buffer).convert("L").tobytes())).reshape(64, 64)
    assert (decoded - ramp[0, 0] * 255).abs().max() < 3


@pytest.mark.parametrize("size", [64, 512, 1024])
def test_noise_is_larger_than_a_flat_image_at_every_size(size: int):
    images = torch.cat([noise(1, size), torch.full((1, 3, size, size), 0.5)])
    sizes = JpegIncompressibility()(images, prompts(2))
    assert sizes.dtype == torch.float32 and sizes.shape == (2,)
    assert sizes[0] > 3 * sizes[1]


def test_neither_the_strides_nor_the_shape_of_the_batch_change_a_score():
    images = noise(5)
    reward = JpegCompressibility()
    whole = reward(images, prompts(5))
    assert torch.equal(whole, reward(images.to(memory_format=torch.channels_last), prompts(5)))
    assert torch.equal(whole, torch.cat([reward(image[None], prompts(1)) for image in images]))


@given(seed=st.integers(0, 2**31), quality=st.integers(1, 100), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_the_same_image_always_gets_the_same_score(seed: int, quality: int, height: int, width: int):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    less, more = JpegCompressibility(quality), JpegIncompressibility(quality)
    assert torch.equal(less(images, prompts(2)), less(images.clone(), prompts(2)))
    assert torch.equal(less(images, prompts(2)), -more(images, prompts(2)))


@pytest.mark.parametrize("quality", [0, 101, -5, 95.0, "95", True])
def test_a_quality_that_jpeg_does_not_have_is_refused(quality):
    with pytest.raises(ValueError, match=r"quality=.*from 1 to 100"):
        JpegCompressibility(quality)

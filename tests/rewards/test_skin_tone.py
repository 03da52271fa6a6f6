"""The classifier skin_tone: the typology angle's closed form, soft votes, faces, and a classifier of one's own."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_detectors
import tiny_rewards
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from rlcm_fast.rewards import build_reward
from rlcm_fast.rewards.faces import CascadeFaces, Owlv2Faces
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.owlv2 import OWLV2, detector
from rlcm_fast.rewards.skin_tone import FaceTones, SkinTone, middle, to_lab, typology_angle, votes_of


def plain(*rgb: int) -> Tensor:
    """An even picture (3, 4, 4)."""
    return torch.tensor(rgb)[:, None, None].expand(3, 4, 4) / 255


def angle_by_hand(*rgb: int) -> float:
    """The ITA of a colour, by the definition of sRGB and CIELAB, number by number."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    y = 0.2126729 * linear[0] + 0.7151522 * linear[1] + 0.0721750 * linear[2]
    z = (0.0193339 * linear[0] + 0.1191920 * linear[1] + 0.9503041 * linear[2]) / 1.08883
    fy, fz = (t ** (1 / 3) if t > 0.008856452 else 7.787037 * t + 16 / 116 for t in (y, z))
    return math.degrees(math.atan((116 * fy - 66) / (200 * (fy - fz))))


@pytest.mark.parametrize("rgb", [(255, 224, 196), (241, 194, 125), (198, 134, 66), (141, 85, 36), (60, 30, 20)])
def test_the_angle_is_the_closed_form(rgb: tuple[int, int, int]):
    assert typology_angle(plain(*rgb)) == pytest.approx(angle_by_hand(*rgb), abs=0.01)


def test_grey_has_no_yellow():
    assert typology_angle(plain(255, 255, 255)) == pytest.approx(90, abs=0.1)
    assert typology_angle(plain(0, 0, 0)) == pytest.approx(-90, abs=0.1)


def test_lab_is_that_of_scikit_image():
    colour = pytest.importorskip("skimage.color")
    pixels = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = colour.rgb2lab(pixels.permute(1, 2, 0).numpy())
    np.testing.assert_allclose(to_lab(pixels).permute(1, 2, 0), theirs, atol=0.02)  # white points are rounded


@pytest.mark.parametrize(
    ("angle", "votes"),
    [
        (90, (1, 0, 0, 0)),
        (34.5, (0.2142, 0.5717, 0.2067, 0.0074)),  # in the middle of its tone
        (41, (0.5, 0.4309, 0.0671, 0.0020)),  # on a bound, half each, but for tails
        (-60, (0, 0, 0, 1)),
    ],
)
def test_votes_are_soft(angle: float, votes: tuple):
    found = votes_of(angle)
    assert found.sum() == pytest.approx(1)
    assert found.tolist() == pytest.approx(votes, abs=1e-4)


def test_votes_change_little_with_the_angle():
    angles = torch.linspace(-80, 90, 1000)
    votes = torch.stack([votes_of(angle.item()) for angle in angles])
    assert (votes >= 0).all()
    assert (votes[1:] - votes[:-1]).abs().max() < 0.01  # of a step of 0.17 degrees


def test_the_middle_of_a_box_is_its_half():
    image = torch.arange(64.0).reshape(1, 8, 8).expand(3, 8, 8)
    skin = middle(image, (0, 0, 8, 8))
    assert skin is not None
    torch.testing.assert_close(skin, image[:, 2:6, 2:6])
    assert middle(image, (20, 20, 30, 30)) is None
    assert middle(image, (-30, -30, -10, -10)) is None


def test_a_picture_without_a_face_has_no_vote():
    tones = FaceTones(lambda images: [(0, 0, 4, 4), None])
    images = torch.stack([plain(255, 224, 196)] * 2)
    assert tones(images).sum(dim=1).tolist() == pytest.approx([1, 0])


def photograph(name: str) -> Tensor:
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255


def test_the_astronaut_is_light_and_coffee_has_no_face():
    """Real weights: those of scikit-image's cascade."""
    classifier = SkinTone()
    assert classifier(photograph("astronaut"), [])[0, 0] > 0.9
    assert classifier(photograph("coffee"), []).tolist() == [[0, 0, 0, 0]]
    assert classifier.used["package"].startswith("scikit-image 0.")


def test_the_astronauts_angle_is_the_published_one():
    image = photograph("astronaut")
    (box,) = CascadeFaces()(image)
    assert box is not None
    skin = middle(image[0], box)
    assert skin is not None
    assert typology_angle(skin) == pytest.approx(55.05, abs=1)  # 55.68: the box depends on the smallest face


def test_several_threads_may_look_for_faces():
    faces, images = CascadeFaces(), photograph("astronaut")
    once = faces(images)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(faces(images))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [once, once]


def test_a_tiny_picture_has_no_face():
    assert CascadeFaces()(torch.zeros(1, 3, 16, 16)) == [None]


def test_owlv2_gives_its_best_box(tmp_path: Path):
    model = detector(ModelFiles("model", tiny_detectors.save_owlv2(tmp_path), OWLV2), Placement.of("fp32", "cpu", 4))
    images = tiny_rewards.images()
    found = model(images, [["a photo of a human face"]] * 4)
    for box, expected in zip(Owlv2Faces(model)(images), found, strict=True):
        best = expected.scores[:, 0].max()
        if best <= 0.1:
            assert box is None
        else:
            assert box == pytest.approx(expected.boxes[expected.scores[:, 0].argmax()].tolist())


@pytest.mark.parametrize("settings", [None, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}])
def test_a_classifier_of_ones_own_votes_with_its_probabilities(settings: dict | None, tmp_path: Path):
    folder = tiny_detectors.save_vit(tmp_path, num_labels=5)
    if settings:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    classifier = SkinTone(folder, device="cpu", batch_size=3)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # of its size: nothing is resized
    mean = torch.tensor(settings["image_mean"] if settings else [0.5] * 3)[:, None, None]
    std = torch.tensor(settings["image_std"] if settings else [0.5] * 3)[:, None, None]
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(folder).eval()((images - mean) / std).logits
    expected = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    torch.testing.assert_close(classifier(images, []), expected, atol=1e-5, rtol=0)
    assert classifier.num_classes == 5


def test_parity_takes_it_and_says_what_it_used(tmp_path: Path):
    folder = tiny_detectors.save_vit(tmp_path)
    arguments = {"classifier": "skin_tone", "classifier_arguments": {"model": folder, "device": "cpu"}}
    reward = build_reward("distribution_parity", arguments, group_size=2)
    described = reward.reward.describe(tiny_rewards.images(), tiny_rewards.PROMPTS)  # pyright: ignore
    assert described.shape == (4, 4)
    assert reward.reward.used["model"]["model"] == folder  # pyright: ignore
    with pytest.raises(ValueError, match="is not one number for each of 4 classes"):
        build_reward("distribution_parity", {**arguments, "target": [0.5, 0.5]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"faces": "eyes"}, "faces=eyes is unknown; give cascade or owlv2"),
        (
            {"model": "no/where/else"},
            "model=no/where/else does not exist; give a folder, or a hub id; it comes from your",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SkinTone(**arguments)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(ValueError, match=r"needs the package skimage .*; pip install 'rlcm_fast\[faces\]'"):
        build_reward("distribution_parity", {"classifier": "skin_tone"})

"""object_detection: the objects of a prompt, OWLv2's pixels and logits, and the reward's formula."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import tiny_rewards
import torch
from PIL import Image
from transformers import Owlv2ForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from rlcm_fast.rewards import build_reward
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.object_detection import ObjectDetection
from rlcm_fast.rewards.objects import objects_of
from rlcm_fast.rewards.owlv2 import OWLV2, detector, prepare
from rlcm_fast.trajectory import Prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_detectors.save_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("a dog next to a bicycle", ("dog", "bicycle")),
        ("an apple and some broccoli", ("apple", "broccoli")),
        ("a pair of skis on side of a hot dog", ("pair of skis", "hot dog")),
        ("a teddy bear near an orange", ("teddy bear", "orange")),
        ("a sandwich beside a handbag", ("sandwich", "handbag")),
        ("a photo of a red car right of a green wine glass", ("red car", "green wine glass")),
        ("A picture of two cats, a lamp and the moon.", ("cats", "lamp", "moon")),
        ("a cat to the left of a cat", ("cat",)),
        ("an astronaut", ("astronaut",)),
        ("a hand on top of a handbag", ("hand", "handbag")),
    ],
)
def test_objects_come_out_of_a_text(text: str, objects: tuple[str, ...]):
    assert objects_of(Prompt(text)) == objects


def test_every_prompt_of_the_papers_task_has_its_two_objects():
    from rlcm_fast.prompts import composition

    for text in composition.held_out() + composition.training()[::97]:
        objects = objects_of(Prompt(text))
        assert len(objects) == 2, text
        assert set(objects) <= set(composition.CLASSES), text


def test_an_explicit_list_comes_before_the_text():
    named = Prompt("it rains", metadata='{"objects": ["a red umbrella", "dog"]}')
    assert objects_of(named) == ("red umbrella", "dog")
    geneval = Prompt("a photo", metadata='{"include": [{"class": "cat", "count": 2}, {"class": "bus", "count": 1}]}')
    assert objects_of(geneval) == ("cat", "bus")
    with pytest.raises(ValueError, match=r'names no object; write its objects beside it, as "objects": \["a cat"\]'):
        objects_of(Prompt("and, beside"))


@pytest.mark.parametrize(
    ("shape", "interior", "at_most", "on_average"),
    [
        ((96, 96), 4, 5e-5, 5e-5),  # enlarged, as 512 to 960 is; the original mirrors the outermost pixels
        ((64, 96), 4, 5e-5, 5e-5),
        ((1024, 1024), 4, 0.03, 0.001),  # shrunk a little: another filter
    ],
)
def test_pixels_are_those_of_the_image_processor(shape, interior: int, at_most: float, on_average: float):
    """As shares of the range of pixels; measured 8e-6, 6e-6, and 0.025 with 0.0005 on average."""
    data = pytest.importorskip("skimage.data")
    photograph = Image.fromarray(data.astronaut()).resize(shape[::-1])
    image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 255
    size = 960 if shape[0] == 1024 else 180
    processor = Owlv2ImageProcessorPil(size={"height": size, "width": size})
    theirs = torch.as_tensor(np.stack(processor(photograph)["pixel_values"]))
    difference = (prepare(image, size) - theirs).abs()[0] * torch.tensor([0.2686, 0.2613, 0.2758])[:, None, None]
    rows = round(size * shape[0] / max(shape)) - interior
    difference = difference[:, interior:rows, interior:-interior]
    assert difference.max() < at_most
    assert difference.mean() < on_average


def test_logits_and_boxes_are_those_of_transformers(folder: str):
    """Although each text is encoded alone and without padding, and the images have different numbers of queries."""
    images = tiny_rewards.images(size=24)
    queries = [["a cat", "a dog 7"], ["a red car"], ["a cat", "a bus", "a dog 7"], ["a bus", "a cat"]]
    found = detector(ModelFiles("model", folder, OWLV2), Placement.of("fp32", "cpu", 3))(images, queries)
    network: Any = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    tokenizer = tiny_rewards.clip_words()
    for row, texts in enumerate(queries):
        ids = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(len(tokens) for tokens in ids)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in ids])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in ids])
        with torch.no_grad():
            pixels = prepare(images[row : row + 1], tiny_detectors.SIZE)
            output = network(input_ids=padded, pixel_values=pixels, attention_mask=mask)
            _, feature_map, _ = network.image_text_embedder(padded, pixels, mask)
            texts_alone = torch.stack(
                [network.owlv2.get_text_features(torch.tensor([t])).pooler_output[0] for t in ids]
            )
            logits = network.class_predictor(feature_map.flatten(1, 2), texts_alone[None])[0]
        torch.testing.assert_close(found[row].scores, logits[0].sigmoid(), atol=1e-5, rtol=0)
        if not (padded[:, 0] == 0).any():
            torch.testing.assert_close(found[row].scores, output.logits[0].sigmoid(), atol=1e-5, rtol=0)
        centre_x, centre_y, width, height = (output.pred_boxes[0] * 24).unbind(dim=1)
        corners = [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]
        torch.testing.assert_close(found[row].boxes, torch.stack(corners, dim=1), atol=1e-4, rtol=0)


def mean_confidence(scores: torch.Tensor, threshold: float) -> float:
    """The formula, box by box, of scores (P, Q)."""
    best = [0.0] * scores.shape[1]
    for box in scores.tolist():
        owner = box.index(max(box))
        if box[owner] > threshold:
            best[owner] = max(best[owner], box[owner])
    return sum(best) / len(best)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.6])
def test_the_reward_is_the_mean_of_the_best_confidences(folder: str, threshold: float):
    images = tiny_rewards.images()
    prompts = [Prompt(text) for text in ("a cat and a dog", "a red car", "a bus beside a cat", "a, b, c and d")]
    reward = build_reward("object_detection", {"model": folder, "threshold": threshold, "device": "cpu"})
    scores = reward(images, prompts)
    model = detector(ModelFiles("model", folder, OWLV2), Placement.of("fp32", "cpu", 8))
    queries = [[f"a photo of a {name}" for name in objects_of(prompt)] for prompt in prompts]
    expected = [mean_confidence(found.scores, threshold) for found in model(images, queries)]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_score_does_not_depend_on_the_batch_or_on_threads(folder: str):
    images, prompts = tiny_rewards.images(), [Prompt("a cat and a dog"), Prompt("a bus")] * 2
    reward = build_reward("object_detection", {"model": folder, "device": "cpu", "batch_size": 3})
    whole = reward(images, prompts)
    parts = torch.cat([reward(images[row : row + 1], prompts[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(reward(images, prompts))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, whole) for result in results)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_plain_images_have_finite_scores(folder: str, value: float):
    reward = build_reward("object_detection", {"model": folder, "device": "cpu"})
    scores = reward(torch.full((2, 3, 40, 24), value), [Prompt("a cat")] * 2)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all() and (scores <= 1).all()


def test_what_was_used_is_said(folder: str):
    reward = ObjectDetection(folder, device="cpu")
    assert reward.used["model"]["model"] == folder
    assert "model.safetensors" in reward.used["model"]["files"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5 is no score below 1"),
        ({"model": "no/where/else"}, "model=no/where/else does not exist; give a folder, or a hub id"),
        ({"dtype": "int8"}, "dtype=int8 is unknown"),
    ],
)
def test_a_mistake_is_one_line(arguments: dict, message: str, folder: str):
    with pytest.raises(ValueError, match=message):
        build_reward("object_detection", {"model": folder, **arguments})


def test_a_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks config.json; .*google/owlv2-base-patch16-ensemble.*Apache-2.0"):
        build_reward("object_detection", {"model": str(tmp_path)})

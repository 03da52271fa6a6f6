"""Texts as the pipelines of diffusers encode them: clip_skip, negative prompts, long prompts, textual inversions."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.chunks import Splitter, split_as_a1111
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.backbones.single_file import tokenizers
from rlcm_fast.backbones.single_file_writing import save_single_file, textual_inversions
from rlcm_fast.config import ModelConfig, PolicyConfig, PromptsConfig
from rlcm_fast.policies import Network, build_policy
from rlcm_fast.trajectory import Conditioning, Prompt

CPU = torch.device("cpu")
SD: Any = StableDiffusionPipeline  # its annotations leave None out
SDXL: Any = StableDiffusionXLPipeline
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"  # a token each: a chunk of the tiny models has 30
LONG = " ".join(LETTERS)
TEXTS = ["a red circle", "", LONG, "a star"]
NEGATIVE = "blurry, a blue square"


@functools.cache
def load(folder: str, clip_skip: int | None = None, **prompts: Any) -> Backbone:
    model = ModelConfig(folder, clip_skip=clip_skip)
    return Backbone.load(model, CPU, torch.float32, kind="ddim", prompts=PromptsConfig(**prompts))


def stock(folder: str) -> Any:
    """The pipeline, with what its clip_skip expects of transformers before version 5."""
    pipeline = (SDXL if "sdxl" in folder else SD).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


def encode(backbone: Backbone, *texts: str) -> Conditioning:
    return backbone.encode([Prompt(text) for text in texts], with_negative=True)


def same(ours: Tensor | None, expected: Tensor) -> bool:
    """Tells whether ours (1, L, E) or (1, P) are bitwise those of a stock pipeline."""
    return ours is not None and torch.equal(ours, expected)


@pytest.fixture(params=["tiny_lcm_folder", "tiny_sd_folder", "tiny_sdxl_folder"])
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["sd", "sdxl"])
def guided(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def test_encodings_are_bitwise_those_of_encode_prompt(folder: str):
    backbone = load(folder)
    for text in TEXTS:
        ours = encode(backbone, text)
        expected = backbone._pipeline.encode_prompt(
            [text], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        assert same(ours.prompt_embeds, expected[0])
        assert same(ours.negative_embeds, expected[1])
        if len(expected) == 4:
            assert same(ours.pooled_embeds, expected[2])
            assert same(ours.negative_pooled, expected[3])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders whose text encoders have four layers."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        original = tiny_pipelines.CLIPTextConfig
        patch.setattr(tiny_pipelines, "CLIPTextConfig", lambda **more: original(**{**more, "num_hidden_layers": 4}))
        for kind in ("sd", "sdxl"):
            save = getattr(tiny_pipelines, f"save_{kind}")
            folders[kind] = save(tmp_path_factory.mktemp(f"deep_{kind}"))
    return folders


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_and_a_negative_prompt_are_diffusers(deep: dict[str, str], kind: str, clip_skip: int):
    backbone, pipeline = load(deep[kind], clip_skip, negative=NEGATIVE), stock(deep[kind])
    plain = load(deep[kind])
    settings = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    for text in TEXTS:
        ours = encode(backbone, text)
        expected = pipeline.encode_prompt([text], negative_prompt=[NEGATIVE], clip_skip=clip_skip, **settings)
        assert same(ours.prompt_embeds, expected[0])
        assert same(ours.negative_embeds, expected[1])
        assert not same(encode(plain, text).prompt_embeds, expected[0])
        if kind == "sdxl":
            assert same(ours.pooled_embeds, expected[2])
            assert same(ours.negative_pooled, expected[3])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_images_are_those_of_the_stock_pipeline_with_these_settings(deep: dict[str, str], kind: str):
    backbone, pipeline = load(deep[kind], 1, negative=NEGATIVE), stock(deep[kind])
    if kind == "sdxl":
        pipeline.scheduler = backbone._pipeline.scheduler = ddim(pipeline)
    unet: Any = backbone.unet
    config = PolicyConfig("ddim", 3, guidance_scale=3.0)
    policy = build_policy(config, Network(unet, unet.config), backbone.scheduler_config)
    _, x_0 = policy.sample(encode(backbone, "a star", "a red circle"), torch.Generator().manual_seed(3))
    expected = pipeline(
        ["a star", "a red circle"],
        negative_prompt=[NEGATIVE] * 2,
        clip_skip=1,
        num_inference_steps=3,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=0)


def ddim(pipeline: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


COMMA, CAT, CAT_1, CAT_2 = 100, 101, 102, 103
JOINED = frozenset({CAT_1, CAT_2})


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], [[]]),
        ([1] * 75, [[1] * 75]),
        ([1] * 76, [[1] * 75, [1]]),
        ([1] * 160, [[1] * 75, [1] * 75, [1] * 10]),
        # A comma among the last 20 tokens ends the chunk, and the comma is its last token.
        ([1] * 60 + [COMMA] + [2] * 20, [[1] * 60 + [COMMA], [2] * 20]),
        ([1] * 55 + [COMMA] + [2] * 30, [[1] * 55 + [COMMA], [2] * 30]),
        ([1] * 54 + [COMMA] + [2] * 30, [[1] * 54 + [COMMA] + [2] * 20, [2] * 10]),
        ([1] * 60 + [COMMA] + [2] * 5 + [COMMA] + [3] * 20, [[1] * 60 + [COMMA] + [2] * 5 + [COMMA], [3] * 20]),
        ([1] * 74 + [COMMA, 2], [[1] * 74 + [COMMA], [2]]),
        ([1] * 60 + [COMMA] + [2] * 14, [[1] * 60 + [COMMA] + [2] * 14]),
        # A comma that finds the chunk full begins the next one.
        ([1] * 75 + [COMMA, 2], [[1] * 75, [COMMA, 2]]),
        # A textual inversion stays whole, and moves alone.
        ([1] * 73 + [CAT, CAT_1, CAT_2, 2], [[1] * 73, [CAT, CAT_1, CAT_2, 2]]),
        ([1] * 72 + [CAT, CAT_1, CAT_2, 2], [[1] * 72 + [CAT, CAT_1, CAT_2], [2]]),
        ([CAT, *[CAT_1] * 80], [[CAT, *[CAT_1] * 74], [CAT_1] * 6]),
    ],
)
def test_tokens_are_split_by_the_rules_of_a1111(tokens: list[int], expected: list[list[int]]):
    assert split_as_a1111(tokens, 75, COMMA, JOINED) == expected


def test_clips_own_tokenizer_splits_after_a_comma_and_pads_each_family_as_it_does():
    for family, name in (("sd15", "tokenizer"), ("sd2", "tokenizer"), ("sdxl", "tokenizer_2")):
        splitter = Splitter(tokenizers(family)[name], most_chunks=2)
        (split,) = splitter.splits(["a photo of a cat, " * 12 + "and a dog in the garden"])
        assert [len(piece) for piece in split.pieces] == [72, 6]
        assert not split.is_cut
        ids, mask = splitter.row(split.pieces[1])
        text = splitter.tokenizer.decode(split.pieces[1])
        stock_ids = splitter.tokenizer(text, padding="max_length", max_length=77, truncation=True)
        assert ids == stock_ids.input_ids
        assert mask == stock_ids.attention_mask


CHUNKED = {"long": "chunks", "max_chunks": 3}
TWO = " ".join([*LETTERS, *LETTERS[:20]])  # 56 tokens, two chunks of the tiny models
THREE = " ".join(LETTERS * 2)  # 72 tokens


def test_chunks_are_encoded_apart_and_lie_one_behind_the_other(guided: str):
    backbone, cut = load(guided, **CHUNKED), load(guided)
    pieces = [" ".join(TWO.split()[:30]), " ".join(TWO.split()[30:])]
    whole, first, second = encode(backbone, TWO), *(encode(cut, piece) for piece in pieces)
    expected = torch.cat([first.prompt_embeds, second.prompt_embeds], dim=1).repeat(1, 3, 1)  # 6 chunks, for 2 and 3
    torch.testing.assert_close(whole.prompt_embeds, expected)
    if whole.pooled_embeds is not None:
        torch.testing.assert_close(whole.pooled_embeds, first.pooled_embeds)
    assert whole.negative_embeds is not None
    assert whole.negative_embeds.shape == whole.prompt_embeds.shape == (1, 6 * 32, expected.shape[2])


def test_encodings_have_one_length_and_a_text_draws_as_it_does_alone(guided: str):
    unet: Any = None
    drawn: dict[str, dict[int, Tensor]] = {text: {} for text in (TEXTS[0], TWO)}
    for max_chunks, texts in ((2, [TWO, TEXTS[0]]), (3, [THREE, TEXTS[0], "", TWO])):
        backbone = load(guided, long="chunks", max_chunks=max_chunks)
        unet = backbone.unet
        scheduler = ddim(backbone._pipeline)
        policy = build_policy(
            PolicyConfig("ddim", 2, guidance_scale=3.0),
            Network(unet, unet.config),
            {**scheduler.config, "_class_name": "DDIMScheduler"},
        )
        together = encode(backbone, *texts)
        assert together.prompt_embeds.shape[1] == {2: 2, 3: 6}[max_chunks] * 32
        for text, images in drawn.items():
            conditioning = together.take(torch.tensor([texts.index(text)]))
            images[max_chunks] = policy.sample(conditioning, torch.Generator().manual_seed(5))[1]
    cut = load(guided)
    plain = policy.sample(encode(cut, TEXTS[0]), torch.Generator().manual_seed(5))[1]
    for images in drawn.values():
        torch.testing.assert_close(images[2], images[3], atol=2e-5, rtol=0)
    torch.testing.assert_close(drawn[TEXTS[0]][2], plain, atol=2e-5, rtol=0)
    assert not torch.allclose(drawn[TWO][2], plain, atol=1e-3)


def test_a_long_negative_prompt_is_read_in_chunks_too(guided: str):
    chunked, cut = load(guided, negative=TWO, **CHUNKED), load(guided, negative=TWO)
    ours, first = encode(chunked, "a star").negative_embeds, encode(cut, "a star").negative_embeds
    assert ours is not None and first is not None
    torch.testing.assert_close(ours[:, :32], first)
    assert not torch.allclose(ours[:, 32:64], first)


def test_dropped_captions_become_the_empty_text_and_not_the_negative_prompt(guided: str):
    backbone, plain = load(guided, negative=NEGATIVE), load(guided)
    captions = backbone.encode([Prompt("a star")], with_negative=True, remember=False)
    assert same(captions.negative_embeds, encode(plain, "a star").negative_embeds)
    assert not same(captions.negative_embeds, encode(backbone, "a star").negative_embeds)


def test_texts_that_are_cut_are_said_once_with_numbers(folder: str, capsys: pytest.CaptureFixture[str]):
    lines: list[str] = []
    backbone = load.__wrapped__(folder)
    backbone.texts.cut.tell = lines.append
    backbone.texts.survey([*TEXTS, *TEXTS])
    head = "1 of 4 distinct prompts are too long for the 30 tokens of a text encoder, and are cut; the longest "
    assert lines == [f"{head}has 36: '{LONG[:40]}...'; prompts.long=chunks reads more"]
    backbone.encode([Prompt(TWO), Prompt(LONG)], with_negative=False)
    assert len(lines) == 1
    assert "truncated" not in "".join(capsys.readouterr())


def test_what_no_survey_saw_is_said_when_it_is_encoded_and_so_is_what_chunks_leave_out(tiny_sd_folder: str):
    lines: list[str] = []
    backbone = load.__wrapped__(tiny_sd_folder, long="chunks")
    backbone.texts.cut.tell = lines.append
    backbone.texts.survey([TWO, "a star"])
    assert lines == []
    backbone.encode([Prompt("a cat"), Prompt(THREE)], with_negative=False)
    assert lines == [
        f"1 of 4 distinct prompts are too long for 2 chunks of 30 tokens, and are cut; the longest has 72: "
        f"'{THREE[:40]}...'; raise prompts.max_chunks to read more"
    ]


@pytest.fixture(scope="module")
def inverted(tiny_sd_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with two textual inversions, <cat> of three vectors and <dog> of one."""
    pipeline = SD.from_pretrained(tiny_sd_folder)
    generator = torch.Generator().manual_seed(1)
    pipeline.load_textual_inversion({"<cat>": torch.randn(3, 24, generator=generator)})
    pipeline.load_textual_inversion({"<dog>": torch.randn(1, 24, generator=generator)})
    folder = tmp_path_factory.mktemp("inverted") / "model"
    pipeline.save_pretrained(folder)
    return str(folder)


def x_0_of(backbone: Backbone, text: str) -> Tensor:
    unet: Any = backbone.unet
    policy = build_policy(
        PolicyConfig("ddim", 2, guidance_scale=3.0), Network(unet, unet.config), backbone.scheduler_config
    )
    return policy.sample(encode(backbone, text), torch.Generator().manual_seed(3))[1]


def test_textual_inversions_of_a_folder_draw_as_in_stock_and_survive_the_export(inverted: str, tmp_path: Path):
    backbone, text = load(inverted), "a <cat> and a <dog>"
    backbone.export(backbone.unet.state_dict(), tmp_path / "export")
    expected = {}
    for path in (inverted, str(tmp_path / "export")):
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0}
        generator = torch.Generator().manual_seed(3)
        expected[path] = stock(path)([text], generator=generator, output_type="latent", **settings).images
        torch.testing.assert_close(x_0_of(load(path), text), expected[path], atol=1e-5, rtol=0)
    assert torch.equal(*expected.values())
    assert not torch.allclose(x_0_of(backbone, "a cat and a dog"), expected[inverted], atol=1e-2)


def test_a_textual_inversion_is_not_split_between_chunks(inverted: str):
    backbone = load(inverted, long="chunks")
    (splitter,) = backbone.texts._splitters
    cat = splitter.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
    letters = " ".join(LETTERS[:29])
    ((split,),) = backbone.texts._splits([f"{letters} <cat> b"])
    assert [len(piece) for piece in split.pieces] == [29, 4]
    assert split.pieces[1][:3] == cat
    ours = encode(backbone, f"{letters} <cat> b").prompt_embeds
    alone = encode(load(inverted), "<cat> b").prompt_embeds
    torch.testing.assert_close(ours[:, 32:], alone)


def test_a_single_file_leaves_textual_inversions_out_and_names_them(inverted: str, tiny_sd_folder: str, tmp_path: Path):
    pipelines = {"with.safetensors": stock(inverted), "without.safetensors": stock(tiny_sd_folder)}
    for name, pipeline in pipelines.items():
        save_single_file(pipeline, tmp_path / name, torch.float32, guidance_scale=1.0)
    ours, plain = (load_file(tmp_path / name) for name in pipelines)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in plain.items())
    found = [textual_inversions(pipeline) for pipeline in pipelines.values()]
    assert found == [["<cat>", "<cat>_1", "<cat>_2", "<dog>"], []]


@pytest.mark.parametrize(
    ("folder", "clip_skip", "negative", "message"),
    [
        ("tiny_sd_folder", 2, "", "model.clip_skip=2 leaves no layer of this model's text encoder; give 1 to 1, or"),
        ("tiny_sdxl_folder", 1, "", "model.clip_skip=1 leaves no layer of this model's text encoder; leave it out"),
        ("tiny_lcm_folder", None, NEGATIVE, f"prompts.negative={NEGATIVE} has no use: the guidance scale is an input"),
    ],
    indirect=["folder"],
)
def test_what_a_model_has_no_use_for_is_refused_before_weights_load(
    folder: str, clip_skip: int | None, negative: str, message: str, tmp_path: Path
):
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    for weights in copied.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        load(str(copied))
    with pytest.raises(ValueError, match=message):
        load(str(copied), clip_skip, negative=negative)

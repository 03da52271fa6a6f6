"""Finds the shapes of an image and scores them against a caption, exactly and without a network.

Backgrounds are near-grey, and grey added to a colour changes its chroma (max - min of RGB) but not its hue. So every
pixel has a colour class (the nearest hue) and a coverage (its chroma over the chroma of that colour), even on
anti-aliased and blurred edges. Connected pixels of one class with a coverage above one half make a component. Small or
thin components, such as the seam where two colours meet, are dropped. Each component is resampled around its centroid
to unit area. Then it is compared by intersection over union with the shapes that the renderer draws, at several angles
and degrees of blur.

Score of an image against a caption (`score`):

    parts    each object:           0.5 for a detection of its shape, 1 if the colour matches too or is left open
             each spatial relation: 1 if both objects score 1 and their centres have the relation: the displacement has
                                    the relation's sign along its axis and is longer along that axis than across it;
                                    "and" adds no part
    score    mean(parts) * num_objects / max(num_objects, num_detections)

under the one-to-one assignment of detections to objects that scores best. The last factor penalises extra shapes. A
detection with a confidence below `MIN_CONFIDENCE` resembles none of the shapes, or covers over a third of the image. It
cannot be an object of the caption, but it counts as a detection. A blank image scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor, from_numpy

from rlcm_fast.shapes.grammar import COLOURS, SHAPES, Caption, Object
from rlcm_fast.shapes.renderer import draw_shape
from rlcm_fast.shapes.scenes import PlacedObject

# B images, H W pixels, K components, T templates, G side of the resampling grid

MIN_CONFIDENCE = 0.75  # scenes reach 0.88, or 0.79 after JPEG at quality 75 or a blur of 2 pixels
_MIN_AREA = 24  # pixels; the smallest shape of a scene, a star of radius 8, covers 79
_MAX_AREA_SHARE = 1 / 3  # of the image; the largest shape of a scene, a circle of radius 20, covers 0.25
_GRID = 24
_HALF_EXTENT = 1.1  # half the side of the grid, in units of sqrt(area); a star reaches 0.9
_TILTS = (-12, -8, -4, 0, 4, 8, 12)  # degrees; scenes tilt by up to 10
_ANGLES = {  # without its larger angles, a square on its corner would pass for a circle
    "circle": (0,),
    "square": (*_TILTS, 18, 27, 36, 45, 54, 63, 72),
    "triangle": _TILTS,
    "star": _TILTS,
}
_BLURS = (0.0, 0.08, 0.16)  # standard deviations, in units of the shape's radius
_TINT = 0.15  # the coverage that the faint tint of a background may reach
_FOUR_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)
_NAMES = tuple(COLOURS)
AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # (axis, sign of first - second)


@dataclass(frozen=True)
class Detection:
    """A coloured shape in an image; lengths are in pixels, `size` is the radius of the circumscribed circle."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    confidence: float  # intersection over union with the best template, in [0, 1]; 0 if too large
    likeness: tuple[float, ...] = ()  # the same for the best template of each of SHAPES; largest for `shape`


def detect(images: Tensor) -> list[list[Detection]]:
    """The shapes of each image, largest first; `images` is (B, 3, H, W) float in [0, 1].

    Raises:
        ValueError: the images have another shape or are not finite.
    """
    # Find the components: connected pixels of one colour.
    pixels = _pixels(images)
    colour, coverage = _segment(pixels)
    labels, owners, classes = _components(colour, coverage)
    found: list[list[Detection]] = [[] for _ in range(len(pixels))]
    if len(owners) == 0:
        return found

    # Compare each component with the templates of all shapes.
    masks = _soft_masks(labels, coverage[owners], owners)
    areas, x, y = _moments(masks)
    likeness = _likeness(_normalised(masks, areas, x, y))
    shapes = likeness.argmax(axis=1)
    likeness[areas > _MAX_AREA_SHARE * masks[0].size] = 0  # or an image of one colour would be a square

    # Sort them by size into their images.
    for k in np.argsort(-areas, kind="stable"):
        shape = SHAPES[shapes[k]]
        size = float(np.sqrt(areas[k] / _unit_area(shape)))
        place = (float(x[k]), float(y[k]), size)
        found[owners[k]].append(
            Detection(shape, _NAMES[classes[k]], *place, float(likeness[k].max()), tuple(likeness[k].tolist()))
        )
    return found


def score(detections: Sequence[Detection], caption: Caption) -> float:
    """How much of `caption` the detections show, in [0, 1]; 1: every object, colour and relation, and nothing else."""
    num_objects = len(caption.objects)
    num_parts = num_objects + (caption.relation in AXES)
    candidates = [*(found for found in detections if found.confidence >= MIN_CONFIDENCE), *[None] * num_objects]
    best = max(_parts_sum(chosen, caption) for chosen in permutations(candidates, num_objects))
    return best / num_parts * num_objects / max(num_objects, len(detections))


def score_images(images: Tensor, captions: Sequence[Caption]) -> Tensor:
    """The `score` of each of images (B, 3, H, W) against its caption, (B,) float32 in [0, 1]."""
    if len(images) != len(captions):
        raise ValueError(
            f"len(captions)={len(captions)} must equal len(images)={len(images)}; pass one caption per image"
        )
    scores = [score(found, caption) for found, caption in zip(detect(images), captions, strict=True)]
    return from_numpy(np.array(scores, dtype=np.float32))


def _parts_sum(chosen: Sequence[Detection | None], caption: Caption) -> float:
    parts = [_object_part(found, item) for found, item in zip(chosen, caption.objects, strict=True)]
    if caption.relation in AXES and min(parts) == 1:
        parts.append(float(_relation_holds(chosen[0], chosen[1], caption.relation)))
    return sum(parts)


def _object_part(found: Detection | None, item: Object) -> float:
    if found is None or found.shape != item.shape:
        return 0.0
    return 1.0 if item.colour in (None, found.colour) else 0.5


def _relation_holds(first: Detection | None, second: Detection | None, relation: str) -> bool:
    if first is None or second is None:
        return False
    axis, sign = AXES[relation]
    displacement = (first.x - second.x, first.y - second.y)
    return sign * displacement[axis] > abs(displacement[1 - axis])


def _pixels(images: Tensor) -> np.ndarray:
    """The images as an array (B, 3, H, W) float32 in [0, 255]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images.shape={tuple(images.shape)} must be (B, 3, H, W); pass RGB images in [0, 1]")
    pixels = images.detach().float().cpu().numpy()
    if not np.isfinite(pixels).all():
        raise ValueError("images contain NaN or infinity; check the sampler or the VAE that made them")
    return np.clip(pixels, 0, 1) * np.float32(255)


def _segment(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour class (B, H, W) int8 and the coverage (B, H, W) float32 in [0, 1] of every pixel."""
    hue, chroma = _hue_and_chroma(np.moveaxis(pixels, 1, 0))
    hues, chromas = _hue_and_chroma(np.array(list(COLOURS.values()), dtype=np.float32).T)
    borders, classes = _hue_borders(hues)
    colour = classes[np.searchsorted(borders, hue)]
    return colour, np.clip(chroma / chromas[colour], 0, 1)


def _hue_and_chroma(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hue in [0, 6) (red, yellow, green, ... at the integers) and the chroma of rgb (3, ...) in [0, 255]."""
    red, green, blue = rgb
    top = np.maximum(np.maximum(red, green), blue)  # three times as fast as rgb.max(axis=0)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = np.where(top == red, (green - blue) / safe % 6, hue)
    return hue, chroma


def _hue_borders(hues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ascending borders midway between neighbouring hues on the circle [0, 6), and the class of each interval."""
    order = np.argsort(hues)
    upper = np.append(hues[order][1:], hues[order][0] + 6)
    borders = (hues[order] + upper) / 2
    if borders[-1] < 6:
        return borders, np.append(order, order[0]).astype(np.int8)
    return np.insert(borders[:-1], 0, borders[-1] - 6), np.append(order[-1], order).astype(np.int8)


def _components(colour: np.ndarray, coverage: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The labels (B, H, W), 0 for none and 1 to K for components, and the image (K,) and colour class (K,) of each."""
    # Label the connected pixels of each colour.
    classes = np.arange(len(_NAMES), dtype=np.int8)[:, None, None]
    same = np.where(coverage > 0.5, colour, -1)[:, None] == classes  # (B, colours, H, W)
    structure = np.zeros((3, 3, 3, 3), dtype=bool)
    structure[1, 1] = _FOUR_NEIGHBOURS
    separate = np.zeros(same.shape, dtype=np.int32)
    ndimage.label(same, structure, output=separate)
    labels = separate.max(axis=1)

    # Drop the small and the thin components, and number the others.
    has_core = np.zeros(labels.max() + 1, dtype=bool)
    has_core[labels[_interior(labels)]] = True
    keep = has_core & (np.bincount(labels.ravel(), minlength=len(has_core)) >= _MIN_AREA)
    keep[0] = False
    labels = (np.cumsum(keep) * keep)[labels]

    # Look up image and colour at some pixel of each component.
    pixel = np.zeros(keep.sum(), dtype=np.int64)
    inside = np.flatnonzero(labels)
    pixel[labels.ravel()[inside] - 1] = inside
    return labels, pixel // labels[0].size, colour.ravel()[pixel]


def _interior(labels: np.ndarray) -> np.ndarray:
    """(B, H, W) bool: whether the 3 x 3 neighbourhood of a pixel has only one label."""
    size = (1, 3, 3)
    return ndimage.minimum_filter(labels, size) == ndimage.maximum_filter(labels, size)


def _soft_masks(labels: np.ndarray, coverage: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The coverage of each component (K, H, W) float32, with a soft edge of two pixels, without other components."""
    image_labels = labels[owners]  # (K, H, W)
    component = image_labels == np.arange(1, len(owners) + 1)[:, None, None]
    near = ndimage.binary_dilation(component, _FOUR_NEIGHBOURS[None], iterations=2) & (component | (image_labels == 0))
    return np.where(near, _stretched(coverage), 0)


def _stretched(coverage: np.ndarray) -> np.ndarray:
    """Stretch coverage so that what a faint tint reaches becomes 0, and as much at the top becomes 1."""
    return np.clip((coverage - _TINT) / (1 - 2 * _TINT), 0, 1)


def _moments(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The area in pixels and the centroid x, y, each (K,); pixel edges lie at the integers, as in the renderer."""
    areas = masks.sum(axis=(1, 2))
    columns = np.arange(masks.shape[2], dtype=np.float32) + 0.5
    rows = np.arange(masks.shape[1], dtype=np.float32) + 0.5
    return areas, masks.sum(axis=1) @ columns / areas, masks.sum(axis=2) @ rows / areas


def _normalised(masks: np.ndarray, areas: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The masks, resampled bilinearly (K, G * G): centroid in the middle, area 1 in grid units of `_HALF_EXTENT`."""
    offsets = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _HALF_EXTENT
    scale = np.sqrt(areas)[:, None]
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))  # samples outside the image fall on a border of zeros
    row, row_share = _taps(y[:, None] + offsets * scale, masks.shape[1])
    column, column_share = _taps(x[:, None] + offsets * scale, masks.shape[2])
    batch = np.arange(len(masks))[:, None, None]
    above = _lerp(padded, batch, row, column, column_share)
    below = _lerp(padded, batch, row + 1, column, column_share)
    return (above + row_share[:, :, None] * (below - above)).reshape(len(masks), -1)


def _taps(position: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower of the two neighbouring samples in an array padded by one, and the share of the upper sample."""
    index = np.clip(position + 0.5, 0, length + 0.999)  # sample i of the padded array lies at i - 0.5
    lower = index.astype(np.int64)
    return lower, (index - lower).astype(np.float32)


def _lerp(padded: np.ndarray, batch: np.ndarray, row: np.ndarray, column: np.ndarray, share: np.ndarray) -> np.ndarray:
    left = padded[batch, row[:, :, None], column[:, None, :]]
    right = padded[batch, row[:, :, None], column[:, None, :] + 1]
    return left + share[:, None, :] * (right - left)


def _likeness(normalised: np.ndarray) -> np.ndarray:
    """The intersection over union (K, shapes) with the best template of each of SHAPES."""
    templates, shapes = _templates()
    intersections = np.stack([np.minimum(normalised, template).sum(axis=1) for template in templates], axis=1)
    unions = normalised.sum(axis=1, keepdims=True) + templates.sum(axis=1) - intersections
    overlap = intersections / unions  # (K, T)
    return np.stack([overlap[:, shapes == s].max(axis=1) for s in range(len(SHAPES))], axis=1)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """The normalised masks (T, G * G) of every shape at every angle, and their index into SHAPES (T,)."""
    pairs = [(s, a) for s in range(len(SHAPES)) for a in _ANGLES[SHAPES[s]]]
    sharp = np.stack([_template(SHAPES[s], angle) for s, angle in pairs])
    blurred = [ndimage.gaussian_filter(sharp, (0, width * 14, width * 14)) for width in _BLURS]
    masks = _stretched(np.concatenate(blurred))
    return _normalised(masks, *_moments(masks)), np.array([s for s, _ in pairs] * len(_BLURS))


@cache
def _unit_area(shape: str) -> float:
    """The area of a shape of circumscribed radius 1."""
    return float(_template(shape, 0).sum()) / 14**2


def _template(shape: str, angle: float) -> np.ndarray:
    """The coverage (64, 64) float32 of a shape of medium size, radius 14, drawn as the renderer does."""
    mask = Image.new("L", (256, 256))
    draw_shape(ImageDraw.Draw(mask), PlacedObject(shape, "red", 32, 32, 14, angle), 4)
    return np.asarray(mask.resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255

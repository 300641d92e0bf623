"""The drawn street scenes: repeatable, varied, thin poles, aligned labels, and not to be told apart by colour."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from random import Random

import numpy as np
import pytest

from bcmf_ext.data import Demo, demo, street
from bcmf_ext.data.street import CLASSES, HEIGHT, POLE, WIDTH, Canvas, Street
from bcmf_ext.errors import UserError

# Of the first four scenes of val: per cent of the pixels by class, and the mean colour.
SHARES = [
    [13.4, 9.1, 33.6, 17.0, 9.5, 6.5, 4.8, 1.8, 0.0],
    [24.7, 9.6, 22.3, 20.9, 6.2, 5.6, 4.7, 1.4, 1.7],
    [22.9, 8.4, 37.7, 10.9, 7.9, 4.9, 4.1, 2.7, 0.5],
    [21.4, 8.9, 19.0, 23.6, 9.9, 7.2, 4.6, 0.9, 0.3],
]
COLOURS = [[105.8, 93.3, 95.9], [115.6, 87.3, 101.9], [154.9, 131.6, 102.4], [117.6, 87.8, 86.3]]


@lru_cache
def scenes(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, H, W, 3) and labels (count, H, W) of the first scenes."""
    dataset = Demo(split)
    pairs = [dataset.pair(i) for i in range(count)]
    return np.stack([image for image, _ in pairs]), np.stack([label for _, label in pairs])


def test_shapes_and_classes() -> None:
    """Scenes are uint8 of one size; every class and ignored pixels occur, and no other value."""
    images, labels = scenes("train", 30)
    assert images.shape == (30, HEIGHT, WIDTH, 3)
    assert images.dtype == labels.dtype == np.uint8
    share = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert share[: len(CLASSES)].min() > 0.01
    assert 0 < share[255] < 0.05
    assert share[: len(CLASSES)].sum() + share[255] == pytest.approx(1)


def test_scenes_are_repeatable() -> None:
    """A scene depends on its split and number alone: not on the order of drawing, nor on global random state."""
    first = Demo("val")
    wanted = [first.image(i) for i in (0, 1, 2)]
    np.random.seed(1)  # noqa: NPY002
    again = Demo("val")
    for i in (2, 0, 1):
        assert (again.image(i) == wanted[i]).all()
        assert (again.label(i) == first.label(i)).all()


def test_scenes_are_the_same_on_every_machine() -> None:
    """How much of each class the first scenes hold, and their colours, are known numbers.

    The tolerance leaves room for another Pillow to round a line otherwise, not for another street.
    """
    images, labels = scenes("val", 4)
    share = np.stack([np.bincount(label.ravel(), minlength=256)[: len(CLASSES)] for label in labels])
    np.testing.assert_allclose(100 * share / (HEIGHT * WIDTH), SHARES, atol=0.3)
    np.testing.assert_allclose(images.mean((1, 2)), COLOURS, atol=0.5)


def test_no_scene_occurs_twice() -> None:
    """Train and val share no scene, and no split repeats one."""
    labels = [*scenes("train", 30)[1], *scenes("val", 30)[1]]
    assert len({hashlib.sha256(label.tobytes()).digest() for label in labels}) == 60


def test_scenes_are_drawn_once_and_safe_from_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene is kept after its first use; what is handed out are copies."""
    drawn: list[str] = []
    draw = street.draw_scene
    monkeypatch.setattr(demo, "draw_scene", lambda seed: drawn.append(seed) or draw(seed))
    dataset = Demo("train")
    image, label = dataset.pair(3)
    kept = image.copy(), label.copy()
    image[:], label[:] = 0, 0
    assert (dataset.image(3) == kept[0]).all()
    assert (dataset.label(3) == kept[1]).all()
    assert len(drawn) == 1


def test_indices_end_where_the_split_ends() -> None:
    """No scenes beyond the split: a loop over the data set must end, and train must not reach others."""
    with pytest.raises(IndexError):
        Demo("val").image(len(Demo("val")))
    with pytest.raises(UserError, match="train, val"):
        Demo("test")


def test_poles_are_one_to_three_pixels_wide() -> None:
    """At any distance a pole is 1, 2 or 3 whole pixels wide in the label, and it begins at odd and even columns."""
    widths, starts = [], []
    for seed in range(60):
        rng = Random(str(seed))
        scene = Street(rng)
        scene.canvas = Canvas()
        scene.draw_pole(rng.uniform(-3, 3), rng.uniform(5, 30), 4)
        row = scene.canvas.finish()[1][round(scene.vanishing_point[1])]
        columns = np.flatnonzero(row == POLE)
        if len(columns):
            assert (np.diff(columns) == 1).all()
            widths.append(len(columns))
            starts.append(columns[0])
    assert set(widths) == {1, 2, 3}
    assert 0.25 < np.mean(np.array(starts) % 2) < 0.75


def test_edges_at_odd_and_even_positions() -> None:
    """Class borders do not prefer a parity: a boundary loss that sees only half of them would show here."""
    _, labels = scenes("train", 30)
    for axis in (1, 2):
        positions = np.nonzero(np.diff(labels, axis=axis))[axis]
        assert 0.45 < (positions % 2).mean() < 0.55


def test_labels_lie_on_the_picture() -> None:
    """Colours change where classes do: contrast is highest exactly at the label's borders, not a pixel beside them."""
    images, labels = scenes("train", 30)
    for axis in (1, 2):
        contrast = np.abs(np.diff(images.astype(float), axis=axis)).mean(-1)
        border = np.diff(labels.astype(int), axis=axis) != 0
        beside = [np.roll(contrast, shift, axis)[border].mean() for shift in (-2, -1, 0, 1, 2)]
        assert np.argmax(beside) == 2
        assert beside[2] > 2 * contrast[~border].mean()
        assert 0.8 < beside[1] / beside[3] < 1.25


def mean_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    classes = len(CLASSES)
    valid = truth != 255
    pairs = truth[valid].astype(int) * classes + prediction[valid]
    matrix = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    hits = np.diag(matrix)
    return float((hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean())


def nearest(colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((colours[:, None] - centres) ** 2).sum(-1).argmin(1)


def k_means(colours: np.ndarray, count: int) -> np.ndarray:
    """(count, 3): Lloyd's algorithm from random samples."""
    rng = np.random.default_rng(0)
    colours = colours[rng.permutation(len(colours))[:3000]]
    centres = colours[:count]
    for _ in range(10):
        owner = nearest(colours, centres)
        centres = np.stack([colours[owner == i].mean(0) if (owner == i).any() else centres[i] for i in range(count)])
    return centres


@pytest.mark.parametrize("centres_per_class", [1, 16])
def test_colour_alone_does_not_tell_the_class(centres_per_class: int) -> None:
    """Nearest mean colour, and nearest of 16 colours per class, stay far under 0.40 mIoU: shape must be learnt."""
    (images, labels), (val_images, val_labels) = scenes("train", 30), scenes("val", 30)
    train, truth = images.reshape(-1, 3).astype(np.float32), labels.ravel()
    centres = np.concatenate([k_means(train[truth == i], centres_per_class) for i in range(len(CLASSES))])
    colours = val_images[:, ::4, ::4].reshape(-1, 3).astype(np.float32)
    prediction = nearest(colours, centres) // centres_per_class
    assert mean_iou(prediction, val_labels[:, ::4, ::4].ravel()) < 0.30


def test_a_colour_table_stays_under_040() -> None:
    """The best that any per-pixel colour rule can do, a table of the likeliest class per colour, misses 0.40 too."""
    (images, labels), (val_images, val_labels) = scenes("train", 30), scenes("val", 30)

    def cell(pixels: np.ndarray) -> np.ndarray:
        r, g, b = (pixels >> 3).astype(int).transpose(3, 0, 1, 2)
        return (r << 10 | g << 5 | b).ravel()

    votes = np.bincount(cell(images) * 256 + labels.ravel(), minlength=256 << 15).reshape(-1, 256)[:, : len(CLASSES)]
    assert mean_iou(votes.argmax(1)[cell(val_images)], val_labels.ravel()) < 0.40

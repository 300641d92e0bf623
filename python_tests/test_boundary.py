"""Boundary IoU, boundary F-score and trimap IoU: mask by mask in plain NumPy, by hand, and what others got wrong."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bcmf_ext import dispatch
from bcmf_ext.metrics import BoundaryFScore, BoundaryIoU, ConfusionMatrix, Counts, TrimapIoU, _counts, boundary

KINDS: tuple[Callable[..., Counts], ...] = (BoundaryIoU, BoundaryFScore, TrimapIoU)
every_kind = pytest.mark.parametrize("kind", KINDS)
WIDTHS = (1, 3, 5, 9, 12)


@pytest.fixture(params=["cpu", "torch"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is read, counted and searched by the compiled kernels, and by PyTorch, as on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "why_not", lambda impl, device: "asked not to")
    elif dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    return request.param


def drawn_maps(n: int, height: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """(prediction, target): areas of 6×6 pixels; the prediction is moved a little and has wrong pixels; a tenth of the
    target is ignored."""
    g = torch.Generator().manual_seed(0)

    def areas(size: int, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        coarse = draw((n, -(-height // size), -(-width // size)))
        return coarse.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]

    target = areas(6, lambda shape: torch.randint(classes, shape, generator=g))
    prediction = target.roll((1, 2), (1, 2))
    noise = torch.rand(target.shape, generator=g) < 0.05
    prediction = torch.where(noise, torch.randint(classes, target.shape, generator=g), prediction)
    ignored = areas(4, lambda shape: torch.rand(shape, generator=g)) < 0.1
    return prediction, torch.where(ignored, 255, target)


def updated(metric: Counts, prediction: Tensor, target: Tensor) -> Counts:
    metric.update(prediction, target)
    return metric


# --------------------------------------------------------------------------------------------------------------------
# The definitions (docs/definitions.md, Metrics), mask by mask


def neighbours(mask: np.ndarray, reach: int, square: bool) -> np.ndarray:
    """(…, H, W): the mask's values at all neighbours, False outside the image."""
    offsets = [
        (y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1) if square or abs(y) + abs(x) == 1
    ]
    padded = np.pad(mask, reach)
    height, width = mask.shape
    return np.stack([padded[reach + y :][:height, reach + x :][:, :width] for y, x in offsets])


def inner_band(mask: np.ndarray, distance: int) -> np.ndarray:
    eroded = mask
    for _ in range(distance):
        eroded = neighbours(eroded, 1, square=True).all(0)
    return mask & ~eroded


def edge(mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return mask & neighbours(valid & ~mask, 1, square=False).any(0)


def distances(sites: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest site."""
    pixels = np.stack(np.indices(sites.shape), -1).reshape(-1, 1, 2)
    where = np.argwhere(sites)
    if not len(where):
        return np.full(sites.shape, np.inf)
    return np.sqrt(((pixels - where) ** 2).sum(-1).min(1)).reshape(sites.shape)


def by_masks(prediction: Tensor, target: Tensor, classes: int, ratio: float = 0.005) -> dict[str, np.ndarray]:
    """All scores."""
    band, trimap = np.zeros((3, classes)), np.zeros((3, len(WIDTHS), classes))
    matched, edges = np.zeros((2, len(WIDTHS), classes)), np.zeros((2, 1, classes))
    reach = max(1, round(ratio * math.hypot(*target.shape[1:])))
    for guess, truth in zip(prediction.numpy(), target.numpy(), strict=True):
        valid = truth != 255
        masks = [((truth == c) & valid, (guess == c) & valid) for c in range(classes)]
        for c, pair in enumerate(masks):
            ours, theirs = (inner_band(mask, reach) for mask in pair)
            band[:, c] += (ours & theirs).sum(), ours.sum(), theirs.sum()
            ours, theirs = (edge(mask, valid) for mask in pair)
            for side, (asked, sites) in enumerate(((ours, theirs), (theirs, ours))):
                edges[side, 0, c] += asked.sum()
                matched[side, :, c] += [(asked & (distances(sites) <= width)).sum() for width in WIDTHS]
        near = distances(np.any([edge(mask, valid) for mask, _ in masks], 0))
        for c, (ours, theirs) in enumerate(masks):
            for i, width in enumerate(WIDTHS):
                a, b = ours & (near <= width), theirs & (near <= width)
                trimap[:, i, c] += (a & b).sum(), a.sum(), b.sum()
    with np.errstate(invalid="ignore"):
        recall, precision = matched / edges
        f_score = np.where(edges[0] > 0, np.nan_to_num(2 * precision * recall / (precision + recall)), np.nan)
        ious = [hits / (truth + guess - hits) for hits, truth, guess in (band, trimap)]
    return {"band": ious[0], "f": f_score, "precision": precision, "recall": recall, "trimap": ious[1]}


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((2, 40, 51), 5), ((1, 1, 40), 3), ((1, 33, 1), 3), ((1, 1, 1), 2), ((1, 40, 30), 40)],
    ids=str,
)
def test_equal_to_mask_by_mask(impl: str, shape: tuple[int, int, int], classes: int) -> None:
    """Protects the definitions, to the last bit, for more classes than a word has bits, and thin images."""
    prediction, target = drawn_maps(*shape, classes)
    expected = by_masks(prediction, target, classes)
    band, f_score, trimap = (updated(kind(classes), prediction, target) for kind in KINDS)
    np.testing.assert_array_equal(band.iou(), expected["band"])
    np.testing.assert_array_equal(f_score.recall(), expected["recall"])
    np.testing.assert_array_equal(f_score.precision(), expected["precision"])
    np.testing.assert_allclose(f_score.f_score(), expected["f"], rtol=1e-15)
    np.testing.assert_array_equal(trimap.iou(), expected["trimap"])
    assert f_score.mean_f_score() == pytest.approx(torch.from_numpy(expected["f"]).nanmean(1).tolist(), nan_ok=True)


@pytest.mark.parametrize("ratio", [0.03, 0.05, 0.07])
def test_wider_bands_mask_by_mask(ratio: float) -> None:
    """Protects bands of 2, 3 and 5 pixels: thin areas, corners, other classes and ignored pixels within them."""
    prediction, target = drawn_maps(2, 40, 51, 5)
    band = updated(BoundaryIoU(5, ratio=ratio), prediction, target)
    np.testing.assert_array_equal(band.iou(), by_masks(prediction, target, 5, ratio)["band"])


@pytest.mark.parametrize("shape", [(2, 70, 530), (2, 300, 20)])
def test_match_within_equals_pytorch(shape: tuple[int, int, int]) -> None:
    """Protects the seams between the kernels' blocks of rows, for any radii, classes and dtypes."""
    if dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    g = torch.Generator().manual_seed(0)
    for classes, dtype, radii in (
        (3, torch.uint8, (1, 3, 5, 9, 12)),
        (70, torch.int32, (2, 20)),
        (1, torch.uint8, (4,)),
        (1, torch.uint8, (0,)),
        (1, torch.int32, (8, 128)),
        (2, torch.uint8, (8, 128)),
    ):
        queries, sites = (
            torch.where(torch.rand(shape, generator=g) < rate, torch.randint(classes, shape, generator=g), classes)
            for rate in (0.5, 0.02)
        )
        if radii[-1] == 128:  # so that it is not far enough for all, and this test does not take long
            if shape[2] > 20:
                continue
            sites = torch.full(shape, classes)
            sites[0, 3, 5] = 0
        found = boundary.match_within(queries.to(dtype), sites.to(dtype), classes, radii)
        expected = boundary._match_within(queries.to(dtype), sites.to(dtype), classes, radii)
        assert torch.equal(found, expected)
        assert len(found.unique()) == len(radii) + 1
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert torch.equal(boundary.match_within(queries.to(dtype), sites.to(dtype), classes, radii), found)
        torch.set_num_threads(threads)


def test_direct_calls_are_memory_safe() -> None:
    """Protects torch.ops from maps that do not fit each other, and from numbers out of range: an error says so."""
    if dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    a, b = torch.randint(4, (2, 2, 9, 11), dtype=torch.uint8)
    bcmf = torch.ops.bcmf
    calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (bcmf.match_within, (3, [1, 4])),
        (bcmf.read_labels, (3, 1)),
        (bcmf.count_pairs, (2, 3)),
    )
    for op, options in calls:
        with pytest.raises(ValueError, match="have the same shape"):
            op(a, b[:1], *options)
        with pytest.raises(ValueError, match=r"are uint8 or int32|holds class ids"):
            op(a.float(), b.float(), *options)
    match, read, count = (op for op, _ in calls)
    for op, wrong in (
        (match, (a[0], b[0], 3, [1])),
        (match, (a, b.int(), 3, [1])),
        (match, (a, b, 3, [])),
        (match, (a, b, 3, [3, 1])),
        (match, (a, b, 3, [-1])),
        (match, (a, b, 3, [129])),
        (match, (a, b, 0, [1])),
        (read, (a, b, 0, 255)),
        (count, (a, b, 0, 3)),
        (count, (a, b, 3, 70_000)),
        (count, (a, b, 60_000, 60_000)),
    ):
        with pytest.raises(ValueError):
            op(*wrong)


def test_large_maps_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the seams between what threads read."""
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(7, (2, 3, 200, 301), generator=g)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    ours = _counts.read_labels(prediction, target, 5, 2)
    torch.set_num_threads(threads)
    monkeypatch.setattr(dispatch, "why_not", lambda impl, device: "asked not to")
    torch.testing.assert_close(ours, _counts.read_labels(prediction, target, 5, 2), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [3, 255, 256])
def test_read_and_count_equal_pytorch(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Protects every pair of integer dtypes, their limits, and ids that a narrower type would take for others: ignored
    and out of range by the same rule."""
    if dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    g = torch.Generator().manual_seed(0)
    dtypes = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)
    found = []
    for impl in ("cpu", "torch"):
        if impl == "torch":
            monkeypatch.setattr(dispatch, "why_not", lambda impl, device: "asked not to")
        for ignored, low, high in ((255, -2, 6), (-1, -2, 6), (2, -2, 6), (255, 250, 310), (-1, -(2**40), 2**40)):
            g.manual_seed(0)
            ids = torch.randint(low, high, (2, 3, 50), generator=g)
            for pair in itertools.product(dtypes, dtypes):
                labels = (_counts.as_labels("ids", each.to(dtype)) for each, dtype in zip(ids, pair, strict=False))
                read = _counts.read_labels(*labels, classes, ignored)
                found.append((impl, *read, _counts.count_pairs(*read[:2], classes, classes)))
                found.append((impl, *read, _counts.count_pairs(read[0].byte(), read[1].int(), 2, classes - 1)))
                found.append((impl, *read, _counts.count_pairs(*read[:2], classes + 1, classes + 1)))
    ours, theirs = ([read[1:] for read in found if read[0] == impl] for impl in ("cpu", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# By hand


def test_by_hand(impl: str) -> None:
    """A square of 4×4 in 10×10 pixels, predicted a column to the right."""
    target, prediction = torch.zeros(1, 10, 10, dtype=torch.uint8), torch.zeros(1, 10, 10, dtype=torch.uint8)
    target[:, 3:7, 2:6] = 1
    prediction[:, 3:7, 3:7] = 1
    # Bands are the squares' outermost pixels, 12 of 16, and share six: of the upper and the lower row three each.
    band = updated(BoundaryIoU(2), prediction, target).iou()
    assert band[1] == 6 / (12 + 12 - 6)
    f_score = updated(BoundaryFScore(2, widths=(1, 2)), prediction, target)
    assert f_score.recall()[:, 1].tolist() == [1, 1]
    assert f_score.mean_f_score() == [1, 1]
    trimap = updated(TrimapIoU(2, widths=(1,)), prediction, target)
    assert trimap.iou()[0, 1] == 12 / (16 + 4)  # no pixel of either square is farther than one from an edge


@every_kind
def test_nothing_counted(kind: Callable[..., Counts]) -> None:
    """Without a valid pixel, and for classes that occur nowhere, scores are NaN: not 0, not 1."""
    ignored = torch.full((1, 5, 6), 255)
    for metric in (kind(3), updated(kind(3), torch.zeros_like(ignored), ignored)):
        assert all(column.isnan().all() for column in metric.scores().values())
        assert all(column.shape == (3,) and column.dtype == torch.float64 for column in metric.scores().values())


def test_a_class_that_is_missed_or_made_up(impl: str) -> None:
    """Class 1 is missed: F is 0. Class 2 is only predicted: without a boundary in the truth it has no F, but a Boundary
    IoU of 0."""
    target, prediction = torch.zeros(1, 12, 12, dtype=torch.uint8), torch.zeros(1, 12, 12, dtype=torch.uint8)
    target[:, 2:5, 2:5] = 1
    prediction[:, 7:10, 7:10] = 2
    f_score = updated(BoundaryFScore(3), prediction, target).f_score()
    assert (f_score[:, 1] == 0).all()
    assert f_score[:, 2].isnan().all()
    assert updated(BoundaryIoU(3), prediction, target).iou()[1:].tolist() == [0, 0]


def test_the_image_border_is_an_edge_of_bands_alone(impl: str) -> None:
    """An image of one class: outside of it there is no mask, so Boundary IoU has a band along the border; for F and
    trimaps the border is no boundary."""
    target = torch.zeros(1, 20, 30, dtype=torch.uint8)
    prediction = target.clone()
    prediction[:, 10, 15] = 1
    assert updated(BoundaryIoU(2), prediction, target).iou()[0] == 96 / (96 + 8)
    assert updated(BoundaryFScore(2), prediction, target).recall().isnan().all()
    assert updated(TrimapIoU(2), prediction, target).iou().isnan().all()


# --------------------------------------------------------------------------------------------------------------------
# What a boundary metric is for, and what others got wrong


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 5])
def test_boundaries_suffer_first(shift: int) -> None:
    """A mask that is moved by some pixels loses more Boundary IoU, and more F at 1 pixel, than IoU; more with each
    pixel (torchgeo-bench #175)."""

    def scores(pixels: int) -> tuple[float, float, float]:
        target = torch.zeros(1, 100, 120, dtype=torch.uint8)
        target[:, 30:70, 30:80] = 1
        prediction = target.roll(pixels, 2)
        confusion, band = updated(ConfusionMatrix(2), prediction, target), updated(BoundaryIoU(2), prediction, target)
        f_score = updated(BoundaryFScore(2, widths=(1,)), prediction, target)
        return confusion.iou()[1].item(), band.iou()[1].item(), f_score.f_score()[0, 1].item()

    iou, band, f_score = scores(shift)
    assert band < iou - 0.01
    if shift > 1:
        assert f_score < iou
        assert scores(shift)[1] < scores(shift - 1)[1]
        assert scores(shift)[2] < scores(shift - 1)[2]


@every_kind
def test_ignored_pixels_change_nothing(impl: str, kind: Callable[..., Counts]) -> None:
    """Whatever is predicted in an ignored region, scores stay the same; and its border is no boundary."""
    prediction, target = drawn_maps(1, 40, 50, 4)
    target[:, 10:30, 15:40] = 255
    other = torch.where(target == 255, (prediction + 1) % 4, prediction)
    a, b = updated(kind(4), prediction, target), updated(kind(4), other, target)
    assert torch.equal(a._counts, b._counts)
    # An ignored strip between two classes is no boundary of either.
    target = torch.zeros(1, 9, 9, dtype=torch.uint8)
    target[:, :, 5:], target[:, :, 4] = 1, 255
    if kind is not BoundaryIoU:
        assert all(column.isnan().all() for column in updated(kind(2), target.clamp(max=1), target).scores().values())


def test_bands_are_of_masks_not_of_ids() -> None:
    """detectron2 erodes the map of ids and subtracts: between 13 and 11 stands a class 2 there, and interiors become
    class 0. Here nothing but 11 and 13 has a band."""
    target = torch.full((1, 40, 40), 13)
    target[:, :, 20:] = 11
    metric = updated(BoundaryIoU(19), target, target)
    assert metric.iou().nan_to_num(-1).tolist() == [1.0 if c in (11, 13) else -1.0 for c in range(19)]
    assert metric._counts[1, [11, 13]].tolist() == [2 * 20 + 2 * 38] * 2
    band = boundary._only_band(target.to(torch.uint8), 1, 19)
    assert set(band.unique().tolist()) == {11, 13, 19}


def test_the_band_grows_with_the_image() -> None:
    """d is 0.5 % of the diagonal, 11 pixels at 1024×2048, and at least 1; `ratio` changes it."""
    sizes = ((1024, 2048), 0.005, 11), ((40, 30), 0.005, 1), ((200, 100), 0.02, 4)
    rounded = ((300, 420), 0.005, 3), ((300, 400), 0.005, 2), ((180, 240), 0.005, 2)  # 2.58; 2.5 and 1.5, to even
    for size, ratio, distance in (*sizes, *rounded):
        target = torch.zeros(1, *size, dtype=torch.uint8)
        metric = updated(BoundaryIoU(1, ratio=ratio), target, target)
        inner = (size[0] - 2 * distance) * (size[1] - 2 * distance)
        assert metric._counts[1, 0] == size[0] * size[1] - inner


# --------------------------------------------------------------------------------------------------------------------
# As metrics are used


@every_kind
def test_adds_up_over_images(kind: Callable[..., Counts]) -> None:
    """Images one by one, with or without a batch dimension and in any integer dtype, count like a batch; reset forgets
    them; an empty batch is nothing."""
    prediction, target = drawn_maps(3, 30, 40, 5)
    batch, single = updated(kind(5), prediction, target), kind(5)
    for p, y, dtype in zip(prediction, target, (torch.uint8, torch.int16, torch.int32), strict=True):
        single.update(p.to(dtype), y.to(dtype))
    single.update(prediction[:0], target[:0])
    assert torch.equal(batch._counts, single._counts)
    with torch.inference_mode():
        single.update(prediction, target)
    single.reset()
    assert single._counts.sum() == 0


@every_kind
def test_many_classes(impl: str, kind: Callable[..., Counts]) -> None:
    """More classes than a byte holds: the same scores as of the same map with few."""
    prediction, target = drawn_maps(1, 30, 40, 5)
    few = updated(kind(5), prediction, target).scores()
    wide = target.where(target == 255, target * 70)
    many = updated(kind(300, ignore_index=255), prediction * 70, wide).scores()
    for a, b in zip(few.values(), many.values(), strict=True):
        assert torch.equal(a.nan_to_num(-1), b[:281:70].nan_to_num(-1))


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_classes_that_do_not_occur_cost_nothing() -> None:
    """Protects from work for each of 65,536 classes in each of many small images, which took minutes."""
    ids = torch.arange(2000, dtype=torch.int32).mul(32).view(2000, 1, 1)
    began = time.monotonic()
    found = torch.ops.bcmf.match_within(ids, ids, 2**16, [0, 128])
    assert torch.equal(found, torch.zeros_like(found))
    assert time.monotonic() - began < 3


@every_kind
def test_wrong_inputs(kind: Callable[..., Counts]) -> None:
    """Sentences, before anything is counted."""
    metric, map = kind(3), torch.zeros(1, 4, 5, dtype=torch.uint8)
    for prediction, target, message in (
        (map, map + 7, "target holds 7, outside the classes 0..2"),
        (map + 7, map, "prediction holds 7, outside"),
        (map[..., :1], map, "differ in shape: resample"),
        (map[0, 0], map[0, 0], r"\(N, H, W\) or \(H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(prediction, target)
    with pytest.raises(TypeError, match="take the arg-max first"):
        metric.update(map.float(), map)
    with pytest.raises(ValueError, match="prediction is on meta and target on cpu: move one of them"):
        metric.update(map.to("meta"), map)
    with pytest.raises(ValueError, match="held ids that have changed since, outside"):
        metric._raise_out_of_range(map, map)  # as where a loader has refilled its buffer meanwhile
    assert metric._counts.sum() == 0


@pytest.mark.parametrize("kind", [BoundaryFScore, TrimapIoU])
def test_wrong_widths(kind: Callable[..., Counts]) -> None:
    """Widths ascend from a pixel to as many as the kernel has room for."""
    for widths in ((), (0, 1), (3, 3), (5, 3), (1, 129)):
        with pytest.raises(ValueError, match="widths are ascending whole numbers of pixels"):
            kind(3, widths=widths)
    for widths in ((1.5, 3), (True, 3), 3):
        with pytest.raises(TypeError, match=r"a width is a whole number|widths are a tuple of whole numbers"):
            kind(3, widths=widths)
    assert kind(3, widths=[np.int64(1), 3]).widths == (1, 3)


@every_kind
def test_labels_as_users_have_them(impl: str, kind: Callable[..., Counts]) -> None:
    """NumPy arrays, also turned round or of two classes, PIL's pictures, and labels with a channel count as the tensors
    of these numbers; what holds no ids is refused by a sentence."""
    g = torch.Generator().manual_seed(0)
    guess, truth = torch.randint(0, 2, (2, 2, 12, 10), generator=g)
    expected = updated(kind(2), guess, truth)._bins
    for convert in (
        Tensor.numpy,
        lambda ids: np.ascontiguousarray(ids.numpy()[..., ::-1])[..., ::-1],
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: ids.numpy().astype(">i4"),
        Tensor.bool,
        lambda ids: ids[:, None].to(torch.int8),
    ):
        assert torch.equal(updated(kind(np.int64(2)), convert(guess), convert(truth))._bins, expected)
    one = updated(kind(2), guess[0], truth[0])
    pictures = (Image.fromarray(ids[0].byte().numpy()) for ids in (guess, truth))
    counted = updated(kind(2), *pictures)
    assert torch.equal(counted._bins, one._bins)
    assert counted.compute().keys() == counted.scores().keys()
    colours = Image.fromarray(np.zeros((12, 10, 3), np.uint8))
    for wrong, says in (
        (guess.float(), "integer class ids, not torch.float32: take the arg-max"),
        (guess.float().numpy(), "integer class ids, not torch.float32"),
        (np.array(["road"]), "integer class ids, not <U4"),
        (colours, "a picture of one channel with the class ids, not of mode RGB"),
        ("label.png", "a tensor, a NumPy array or a PIL picture of class ids, not a str"),
        (None, "not a NoneType"),
    ):
        with pytest.raises(TypeError, match=says):
            kind(2).update(wrong, truth)
    with pytest.raises(TypeError, match=r"num_classes is a whole number, not 2\.0"):
        kind(2.0)


@every_kind
def test_an_ignored_class_has_no_score(impl: str, kind: Callable[..., Counts]) -> None:
    """`ignore_index` may be one of the classes, such as background: a prediction of it is wrong, but no score of 0 that
    would be in the mean."""
    target = torch.zeros(1, 20, 30, dtype=torch.uint8)
    target[:, 3:9, 3:20], target[:, 9:15, 3:20] = 1, 2  # an edge between them
    prediction = target.clone()
    prediction[:, 8, 8:16] = 0
    metric = updated(kind(3, ignore_index=0), prediction, target)
    for score in metric.scores().values():
        assert score[0].isnan()
        assert 0 < score[1] < 1 or (kind is BoundaryFScore and score[1] == 1)
    if isinstance(metric, BoundaryFScore):
        assert metric.precision()[:, 0].isnan().all()


@every_kind
def test_wrong_options(kind: Callable[..., Counts]) -> None:
    """Sentences, too."""
    with pytest.raises(ValueError, match="at least 1, not 0"):
        kind(0)
    with pytest.raises(TypeError, match="not None"):
        kind(3, ignore_index=None)
    with pytest.raises(ValueError, match="share of the image's diagonal, from 0 to 1, not -1"):
        BoundaryIoU(3, ratio=-1)


@every_kind
def test_other_devices_never_wait(kind: Callable[..., Counts]) -> None:
    """Off the CPU nothing in ``update`` asks for a value: a meta tensor has none, so it would raise here."""
    metric, ids = kind(3), torch.zeros(2, 30, 40, dtype=torch.uint8, device="meta")
    metric.update(ids, ids)
    assert metric._bins.device.type == "meta"


@pytest.mark.gpu
@every_kind
def test_cuda(kind: Callable[..., Counts]) -> None:
    """A GPU counts the same as the CPU, without a synchronisation."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prediction, target = drawn_maps(2, 100, 150, 19)
    on_gpu = prediction.cuda(), target.cuda()
    for device in ("cuda", None):
        metric = kind(19, device=device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            metric.update(*on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(metric._counts.cpu(), updated(kind(19), prediction, target)._counts)

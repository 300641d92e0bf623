"""The confusion matrix: hand-counted cases, the official tools, and what others got wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.backends import Backend, every_kernel
from PIL import Image
from torch import Tensor

from bcmf_ext import dispatch, ops, reference
from bcmf_ext.metrics import ConfusionMatrix, upsample_argmax


def confusion(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> ConfusionMatrix:
    metric = ConfusionMatrix(num_classes, ignore_index)
    metric.update(prediction, target)
    return metric


def drawn_maps(*shape: int, absent: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """(prediction, target) of 19 classes, two thirds right, a tenth of the target ignored; absent classes nowhere."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([c for c in range(19) if c not in absent])
    draw = lambda: classes[torch.randint(len(classes), shape, generator=generator)]  # noqa: E731
    target, noise = draw(), draw()
    prediction = torch.where(torch.rand(shape, generator=generator) < 2 / 3, target, noise)
    return prediction, torch.where(torch.rand(shape, generator=generator) < 0.1, 255, target)


# By hand


def test_by_hand() -> None:
    """Rows are the truth, columns the prediction, ignored pixels nowhere; a class found in neither is NaN and left out
    of the mean."""
    target = torch.tensor([[0, 0, 1], [1, 1, 255]])
    prediction = torch.tensor([[0, 1, 1], [1, 0, 2]])
    metric = confusion(prediction, target, 4)
    assert metric.matrix.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert metric.matrix.dtype == torch.int64
    iou = metric.iou()
    assert iou.dtype == torch.float64
    assert iou[:2].tolist() == [1 / 3, 2 / 4]
    assert iou[2:].isnan().all()
    assert metric.mean_iou() == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-15)
    assert metric.pixel_accuracy() == 3 / 5


def test_nothing_counted() -> None:
    """Without a valid pixel the scores are NaN: no error, and no 0 that would look like a result."""
    for metric in (ConfusionMatrix(3), confusion(torch.tensor([0, 9]), torch.tensor([255, 255]), 3)):
        assert metric.matrix.sum() == 0
        assert metric.iou().isnan().all()
        assert math.isnan(metric.mean_iou())
        assert math.isnan(metric.pixel_accuracy())


def test_accumulates_and_resets() -> None:
    """Batches add up to the same counts as one big update; reset forgets them."""
    prediction, target = drawn_maps(4, 20, 30)
    metric = ConfusionMatrix(19)
    for p, y in zip(prediction, target, strict=True):
        metric.update(p, y)
    assert torch.equal(metric.matrix, confusion(prediction, target, 19).matrix)
    metric.reset()
    assert metric.matrix.sum() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    """Any integer dtype counts the same: 18 · 19 + 18 must not wrap in uint8."""
    prediction, target = drawn_maps(40, 50)
    expected = confusion(prediction, target, 19).matrix
    assert torch.equal(confusion(prediction.to(dtype), target.to(dtype), 19).matrix, expected)


@pytest.mark.parametrize("ignore_index", [-1, -100, 1])
def test_other_ignore_index(ignore_index: int) -> None:
    """A negative ignore index works, and so does one among the classes."""
    target = torch.tensor([0, 0, 2, ignore_index])
    prediction = torch.tensor([0, 2, 2, 0])
    assert confusion(prediction, target, 3, ignore_index).matrix.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_strided_and_empty_inputs() -> None:
    """Transposed views are read as they are, and an empty batch counts nothing."""
    prediction, target = drawn_maps(6, 8)
    assert torch.equal(confusion(prediction.T, target.T, 19).matrix, confusion(prediction, target, 19).matrix)
    assert confusion(prediction[:0], target[:0], 19).matrix.sum() == 0


def test_inference_mode() -> None:
    """Counts made in inference mode can be added to and reset outside it."""
    prediction, target = drawn_maps(6, 8)
    with torch.inference_mode():
        metric = confusion(prediction, target, 19)
    metric.reset()
    with torch.inference_mode():
        metric.update(prediction, target)
    metric.update(prediction, target)
    assert metric.matrix.sum() == 2 * (target != 255).sum()


# Wrong input


def test_ids_out_of_range() -> None:
    """Ids that are no class raise and are named, with whose they are; the counts stay as they were."""
    metric = ConfusionMatrix(11)
    good = torch.tensor([1, 2])
    metric.update(good, good)
    with pytest.raises(ValueError, match=r"target holds 11, 33, outside the classes 0\.\.10, and only the label 255"):
        metric.update(torch.tensor([0, 0, 0]), torch.tensor([11, 33, 255], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"target holds -1 and prediction holds 11, 255"):
        metric.update(torch.tensor([255, 11, 0]), torch.tensor([1, 1, -1]))
    for prediction, target, whose in ((good, -good, "target holds -2, -1"), (-good, good, "prediction holds -2, -1")):
        with pytest.raises(ValueError, match=f"{whose}, outside"):
            metric.update(prediction, target)
    with pytest.raises(ValueError, match=r"target holds 255, outside"):  # uint8 has no -1 to ignore
        ConfusionMatrix(11, ignore_index=-1).update(good[:1], torch.tensor([255], dtype=torch.uint8))
    assert metric.matrix.sum() == 2


def test_other_devices_never_wait() -> None:
    """Off the CPU nothing in ``update`` asks for a value (a meta tensor has none, so it would raise here), and counts
    follow the tensors. Ids out of range there raise when the counts are read."""
    metric = ConfusionMatrix(3)
    ids = torch.zeros(2, 4, dtype=torch.uint8, device="meta")
    metric.update(ids, ids)
    assert metric._bins.device.type == "meta"

    metric = ConfusionMatrix(3)
    metric._bins[-1] = 5  # as an update on a GPU leaves them
    for read in (lambda: metric.matrix, metric.iou, metric.mean_iou, metric.pixel_accuracy):
        with pytest.raises(ValueError, match=r"5 pixels have a label or a prediction outside the classes 0\.\.2"):
            read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    """A GPU counts the same as the CPU, without a synchronisation, and reports ids out of range when read."""
    prediction, target = drawn_maps(4, 200, 300)
    on_gpu = prediction.cuda(), target.cuda()
    metric = ConfusionMatrix(19, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(metric.matrix.cpu(), confusion(prediction, target, 19).matrix)
    metric.update(on_gpu[0] + 19, on_gpu[1])
    with pytest.raises(ValueError, match=f"{int((target != 255).sum())} pixels"):
        metric.mean_iou()


def test_wrong_shapes_and_dtypes() -> None:
    """Logits, or a prediction at the logits' size, are refused in a sentence; nothing is broadcast."""
    target = torch.zeros(2, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"prediction \(2, 1, 1\) and target \(2, 8, 8\) differ in shape: resample"):
        ConfusionMatrix(3).update(torch.zeros(2, 1, 1, dtype=torch.int64), target)
    with pytest.raises(TypeError, match=r"prediction holds integer class ids, not torch.float32: take the arg-max"):
        ConfusionMatrix(3).update(torch.zeros(2, 8, 8), target)


# The official tools


def test_equals_the_official_evaluator(tmp_path: Path) -> None:
    """Files in Cityscapes' own format through Cityscapes' own evaluator: every class IoU and the mean are equal to the
    last bit but one, absent classes and ignored ground truth included."""
    pytest.importorskip("cityscapesscripts")
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
    from cityscapesscripts.helpers.labels import trainId2label

    args = official.args
    args.evalInstLevelScore = False
    matrix, metric = official.generateMatrix(args), ConfusionMatrix(19)
    ids = np.array([trainId2label[c].id for c in range(19)] + [0] * 237, dtype=np.uint8)  # 0: unlabeled, ignored
    prediction, target = drawn_maps(3, 64, 128, absent=(4, 16))
    for i, (p, y) in enumerate(zip(prediction, target, strict=True)):
        files = [str(tmp_path / f"{i}_{kind}.png") for kind in ("prediction", "truth")]
        for file, map_ in zip(files, (p, y), strict=True):
            Image.fromarray(ids[map_.numpy()]).save(file)
        official.evaluatePair(*files, matrix, {}, {}, args)
        metric.update(p, y)

    theirs = {c: official.getIouScoreForLabel(int(ids[c]), matrix, args) for c in range(19)}
    np.testing.assert_array_equal(metric.iou().numpy(), list(theirs.values()))
    assert metric.iou().isnan().sum() == 2
    assert metric.mean_iou() == pytest.approx(official.getScoreAverage(theirs, args), rel=1e-15)


def test_equals_torchmetrics() -> None:
    """torchmetrics' MulticlassJaccardIndex(ignore_index=255) gives the same class IoUs where every class occurs. (Its
    MeanIoU averages over images, and cannot ignore 255.)"""
    classification = pytest.importorskip("torchmetrics.classification")
    prediction, target = drawn_maps(3, 64, 128)
    theirs = classification.MulticlassJaccardIndex(19, ignore_index=255, average=None)
    macro = classification.MulticlassJaccardIndex(19, ignore_index=255)
    metric = confusion(prediction, target, 19)
    assert metric.iou().numpy() == pytest.approx(theirs(prediction, target).numpy(), abs=1e-6)
    assert metric.mean_iou() == pytest.approx(macro(prediction, target).item(), abs=1e-6)
    target[target == 255] = 0
    macro = classification.MulticlassJaccardIndex(19, ignore_index=0)
    assert confusion(prediction, target, 19, 0).mean_iou() == pytest.approx(macro(prediction, target).item(), abs=1e-6)


def test_the_matrix_is_a_copy() -> None:
    """Whoever clears its diagonal to look at what is confused does not change the scores."""
    metric = confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
    metric.matrix.fill_diagonal_(0)
    assert metric.mean_iou() == 0.5


# What others got wrong, one test for each


def test_ignored_pixels_are_not_right_or_wrong() -> None:
    """PIDNet's pixel accuracy counts 255 as valid: 3 of 4 right pixels became 3 of 8."""
    target = torch.tensor([0, 0, 1, 1, 255, 255, 255, 255])
    prediction = torch.tensor([0, 0, 1, 0, 0, 1, 0, 1])
    assert confusion(prediction, target, 2).pixel_accuracy() == 3 / 4


def test_the_mean_is_over_classes_in_truth_or_prediction() -> None:
    """Three conventions, one right. Class 2 is only predicted, class 3 is nowhere: HRNet's zero-fill divides by four,
    detectron2 leaves out class 2; the official tool leaves out class 3 alone."""
    target = torch.tensor([0, 0, 0, 1])
    prediction = torch.tensor([0, 0, 2, 1])
    zero_filled, present_in_truth = (2 / 3 + 1) / 4, (2 / 3 + 1) / 2
    mean = confusion(prediction, target, 4).mean_iou()
    assert mean == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-15)
    assert mean not in (pytest.approx(zero_filled), pytest.approx(present_in_truth))


def test_the_mean_is_over_the_data_set() -> None:
    """torchmetrics' MeanIoU averages the scores of images: missing a small object in one of two halves its class."""
    metric = ConfusionMatrix(2)
    metric.update(torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 1, 0]))
    metric.update(torch.tensor([0, 0, 0, 0]), torch.tensor([1, 0, 0, 0]))
    assert metric.iou()[1] == 3 / 4


def test_counts_are_exact_beyond_float32() -> None:
    """Ultralytics counts in float32, where 2²⁴ + 1 is 2²⁴; a Cityscapes class has 5·10⁸ pixels."""
    metric = ConfusionMatrix(2)
    metric._bins[0] = 2**53  # nor may a float64 be in between
    one = torch.zeros(1, dtype=torch.uint8)
    metric.update(one, one)
    assert metric.matrix[0, 0] == 2**53 + 1


# Several processes

_RANK = """
import sys, torch
from bcmf_ext import dispatch, ops, reference
from bcmf_ext.metrics import ConfusionMatrix, upsample_argmax
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
metric = ConfusionMatrix(3)
with torch.inference_mode():
    if rank == 0:  # an uneven split: the other process has no image at all
        metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]))
metric.all_reduce()
print(metric.matrix.tolist())
torch.distributed.destroy_process_group()
"""


def test_all_reduce(tmp_path: Path) -> None:
    """Two processes end with the same sums, without padded duplicates; a single process changes nothing."""
    metric = confusion(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), 3)
    expected = [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    metric.all_reduce()
    assert metric.matrix.tolist() == expected

    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    processes = []
    for rank in "01":
        command = [sys.executable, "-c", _RANK, rank, str(tmp_path / "store")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [f"{expected}\n"] * 2


# upsample_argmax


@every_kernel
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "wanted"),
    [((7, 9), (56, 72)), ((7, 9), (7, 9)), ((5, 6), (13, 31)), ((1, 1), (4, 3)), ((40, 31), (9, 8)), ((5, 4), (1, 8))],
)
def test_upsample_argmax(backend: Backend, size: tuple, wanted: tuple, dtype: torch.dtype, align_corners: bool) -> None:
    """The class of the largest resampled logit, in any dtype and layout; another only where two are almost equal."""
    z = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z.to(backend.device, dtype)
    exact = reference.resample(z.double(), wanted, align_corners)
    for logits in (z, z.contiguous(memory_format=torch.channels_last)):
        found = ops.UPSAMPLE_ARGMAX[backend.impl](logits, *wanted, align_corners)
        assert (found.shape, found.dtype) == ((2, *wanted), torch.uint8)
        chosen = exact.gather(1, found[:, None].long())[:, 0]
        assert (exact.amax(1) - chosen <= (1e-12 if dtype == torch.float64 else 1e-5)).all()


@every_kernel
def test_upsample_argmax_at_ties_and_limits(backend: Backend) -> None:
    """The lowest class of equals; NaN as torch.argmax has it; int32 for many classes; empty batches; a direct call with
    wrong inputs reads nothing out of bounds; schema and fake kernel."""
    argmax = ops.UPSAMPLE_ARGMAX[backend.impl]
    z = torch.tensor([[1.0, 2, 2], [3, 3, 3], [0, math.nan, 5], [math.nan, math.nan, 9], [-math.inf, -math.inf, 0]])
    z = z.T.reshape(1, 3, 1, 5).contiguous().to(backend.device)
    for logits in (z, z.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(argmax(logits, 1, 5, False).long(), z.argmax(1))
    many = torch.zeros(1, 300, 2, 2, device=backend.device)
    many[0, 299] = 1
    assert argmax(many, 4, 4, False).dtype == torch.int32
    assert (argmax(many, 4, 4, False) == 299).all()
    assert argmax(many[:0], 4, 4, False).shape == (0, 4, 4)
    assert (argmax(many[:, :1].double(), 4, 4, False) == 0).all()
    for wrong in ((z[0], 1, 5), (z[:, :, :0], 1, 5), (z, 1, 2**30)):
        with pytest.raises(ValueError, match=r"shape|size|side"):
            argmax(*wrong, False)
    for logits in (z, many, z.double().contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(argmax, (logits, 7, 9, False))


def test_upsample_argmax_under_torch_func() -> None:
    """It has no impl= to ask for PyTorch with: there it takes that by itself."""
    z = torch.randn(3, 4, 5, 6)
    together = torch.func.vmap(lambda image: upsample_argmax(image[None], (10, 12)))(z)[:, 0]
    assert torch.equal(together, upsample_argmax(z, (10, 12)))


def test_upsample_argmax_as_users_call_it() -> None:
    """The same by PyTorch and by our kernels; wrong inputs are a sentence."""
    z = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(upsample_argmax(z, (20, 30)).long(), reference.resample(z, (20, 30)).argmax(1))
    with pytest.raises(TypeError, match="floating point"):
        upsample_argmax(torch.zeros(1, 3, 2, 2, dtype=torch.long), (4, 4))
    with pytest.raises(ValueError, match="shape"):
        upsample_argmax(torch.zeros(3, 2, 2), (4, 4))


@pytest.mark.parametrize("classes", [1, 5, 300])
@pytest.mark.parametrize(("size", "wanted"), [((7, 9), (56, 72)), ((33, 40), (33, 40)), ((3, 2), (9, 1100))])
def test_update_from_logits(size: tuple, wanted: tuple, classes: int) -> None:
    """Counts exactly what update counts of the arg-max, and returns that, for every dtype and layout."""
    generator = torch.Generator().manual_seed(0)
    for dtype, label_dtype in (
        (torch.float32, torch.uint8),
        (torch.bfloat16, torch.int16),
        (torch.float64, torch.long),
    ):
        z = torch.randn(2, classes, *size, generator=generator).to(dtype)
        target = torch.randint(0, min(classes, 250), (2, *wanted), generator=generator).to(label_dtype)
        target[:, 2:5, :7] = 255
        for logits, labels in (
            (z, target),
            (z.contiguous(memory_format=torch.channels_last), target.mT.contiguous().mT),
        ):
            fused, plain = ConfusionMatrix(classes), ConfusionMatrix(classes)
            for align_corners in (False, True):
                prediction = fused.update_from_logits(logits, labels, align_corners)
                assert torch.equal(prediction, upsample_argmax(logits, wanted, align_corners))
                plain.update(prediction, labels)
            assert torch.equal(fused.matrix, plain.matrix)
            assert fused.matrix.sum() == 2 * (labels != 255).sum()


def test_update_from_logits_of_wrong_inputs() -> None:
    """The same sentence as of update for a wrong label, and nothing counted; shapes and classes that do not fit."""
    confusion = ConfusionMatrix(3)
    logits, target = torch.zeros(2, 3, 4, 4), torch.full((2, 8, 8), 7)
    for wrong in (lambda: confusion.update_from_logits(logits, target), lambda: confusion.update(target, target)):
        with pytest.raises(ValueError, match=r"target holds 7.*outside the classes 0\.\.2"):
            wrong()
    assert confusion.matrix.sum() == 0
    with pytest.raises(ValueError, match="logits have 4 classes and the matrix has 3"):
        confusion.update_from_logits(torch.zeros(2, 4, 4, 4), target)
    with pytest.raises(ValueError, match="target has the shape"):
        confusion.update_from_logits(logits, target[0])
    with pytest.raises(TypeError, match="floating point"):
        confusion.update_from_logits(logits.long(), target)
    with pytest.raises(TypeError, match="integer class ids"):
        confusion.update_from_logits(logits, target.float())
    assert confusion.update_from_logits(logits[:0], target[:0]).shape == (0, 8, 8)


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_upsample_confusion_as_an_op() -> None:
    """Schema and fake kernel of the compiled op."""
    for classes in (3, 300):
        logits = torch.randn(2, classes, 3, 4)
        target = torch.randint(0, 3, (2, 7, 9))
        torch.library.opcheck(torch.ops.bcmf.upsample_confusion, (logits, target, 255, False))

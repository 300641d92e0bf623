"""The definitions themselves: hand-computed cases, a brute-force CPG, gradcheck, edge cases, and others' bugs."""

from __future__ import annotations

import math
import shutil
from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcmf_ext import reference
from bcmf_ext.options import BCL, CPG, OHEM

LOSSES = {
    "ce": reference.cross_entropy,
    "ohem": lambda z, y, **k: reference.cross_entropy(z, y, ohem=OHEM(0.7, 5), **k),
    "bcl": reference.boundary_corrected_loss,
    "bcl flipped": lambda z, y, **k: reference.boundary_corrected_loss(z, y, supervise="flipped", step=(1, 2), **k),
    "cpg": reference.cpg_loss,
    "cpg 5": lambda z, y, **k: reference.cpg_loss(z, y, kernel_size=5, **k),
    "cpg 7 centre": lambda z, y, **k: reference.cpg_loss(z, y, kernel_size=7, ignore_mode="centre", **k),
    "cpg sparse": reference.cpg_loss_sparse,
    "criterion": lambda z, y, **k: reference.segmentation_loss(z, y, bcl=0.4, cpg=1.0, **k).total,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def blocks(n: int, c: int, h: int, w: int, size: int = 4, seed: int = 0) -> Tensor:
    """Random labels in size×size blocks."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, c, (n, -(-h // size), -(-w // size)), generator=g)
    return y.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :h, :w].contiguous()


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def probabilities_to_logits(p_of_class_1: list[float]) -> Tensor:
    """A 1×W image of two classes with these probabilities."""
    p = torch.tensor(p_of_class_1, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().view(1, 2, 1, -1)


# --------------------------------------------------------------------------------------------------------------------
# Hand-computed


def test_cross_entropy_by_hand() -> None:
    """Protects the weighted mean: (w₀·(−ln .9) + w₁·(−ln .6)) / (w₀ + w₁); the ignored pixel counts nowhere."""
    z, y = probabilities_to_logits([0.1, 0.6, 0.5]), torch.tensor([[[0, 1, 255]]])
    weight = torch.tensor([2.0, 3.0])
    expected = (2 * -math.log(0.9) + 3 * -math.log(0.6)) / 5
    assert reference.cross_entropy(z, y, weight=weight).item() == pytest.approx(expected, rel=1e-12)


def test_ohem_by_hand() -> None:
    """Protects both branches of OHEM: the threshold, and min_kept with the ties at the last place included."""
    z = probabilities_to_logits([0.1, 0.2, 0.2, 0.4])
    y = torch.zeros(1, 1, 4, dtype=torch.long)  # p of the label: .9, .8, .8, .6
    hard = reference.cross_entropy(z, y, ohem=OHEM(0.7, 0))
    assert hard.item() == pytest.approx(-math.log(0.6))
    with_ties = reference.cross_entropy(z, y, ohem=OHEM(0.7, 2))
    assert with_ties.item() == pytest.approx(-(math.log(0.6) + 2 * math.log(0.8)) / 3)
    weighted = reference.cross_entropy(z, y, weight=torch.tensor([5.0, 1.0]), ohem=OHEM(0.7, 0))
    assert weighted.item() == pytest.approx(-5 * math.log(0.6))  # divided by |S|, not by Σw
    assert reference.cross_entropy(z, y, ohem=0.7).item() == pytest.approx(-math.log(0.9 * 0.8 * 0.8 * 0.6) / 4)


def test_flip_index_is_the_permutation_of_the_spec() -> None:
    """Protects π_s: groups of s swap, an index without a partner stays, and flipping twice is the identity."""
    assert reference.flip_index(5, 1).tolist() == [1, 0, 3, 2, 4]
    assert reference.flip_index(6, 2).tolist() == [2, 3, 0, 1, 4, 5]
    assert reference.flip_index(7, 2).tolist() == [2, 3, 0, 1, 6, 5, 4]
    for length, step in product(range(1, 20), range(1, 9)):
        flip = reference.flip_index(length, step)
        assert flip[flip].tolist() == list(range(length))


def test_bcl_by_hand() -> None:
    """Protects flip, compare, NMS, threshold and both readings on one row: q = −ln(.1, .2, .4, .1)."""
    z, y = probabilities_to_logits([0.1, 0.2, 0.6, 0.9]), torch.tensor([[[0, 0, 1, 1]]])
    original = reference.boundary_corrected_loss(z, y, step=2)
    assert original.item() == pytest.approx(-math.log(0.9))
    flipped = reference.boundary_corrected_loss(z, y, step=2, supervise="flipped", alpha=0.3, beta=0.6)
    assert flipped.item() == pytest.approx(2 * (0.3 * -math.log(0.9) + 0.6 * -math.log(0.1)) / 4)
    # Step 1 swaps equal neighbours: the edge is invisible, q = ℓ⁰, and only the maximum above −ln .7 is kept.
    assert reference.boundary_corrected_loss(z, y, step=1).item() == pytest.approx(-math.log(0.6))
    both = reference.boundary_corrected_loss(z, y, step=(1, 2))
    assert both.item() == pytest.approx(-(math.log(0.6) + math.log(0.9)) / 2)
    # An ignored pixel takes its partners out of V₃: 0 and 2 leave, q₁ = −ln .2 and q₃ = −ln .1 are maxima.
    y = torch.tensor([[[255, 0, 1, 1]]])
    assert reference.boundary_corrected_loss(z, y, step=2).item() == pytest.approx(-math.log(0.8 * 0.9) / 2)


def test_thresholds_are_strict() -> None:
    """Protects "exceeds": a pixel whose probability is exactly the threshold is neither hard nor a boundary pixel."""
    z, y = torch.zeros(1, 2, 1, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.long)
    assert z.log_softmax(1)[0, 0, 0, 0].item() == math.log(0.5)
    assert reference.cross_entropy(z, y, ohem=OHEM(0.5, 0)).item() == 0
    assert reference.boundary_corrected_loss(z, y, threshold=0.5).item() == 0


@pytest.mark.parametrize("supervise", ["original", "flipped"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_bcl_equals_its_definition_written_as_loops(supervise: str, step: int) -> None:
    """Protects every index of BCL, V₃ and the two denominators included, against the definition pixel by pixel."""
    n, c, h, w = 2, 3, 7, 8
    z, y = 2 * noise(n, c, h, w), blocks(n, c, h, w, 2)
    y[0, 0, 0] = y[1, 4, 2] = y[1, 6, 7] = y[0, 3, 5] = 255
    nll = -z.log_softmax(1)

    def partner(i: int, length: int) -> int:
        j = i + step if (i // step) % 2 == 0 else i - step
        return j if j < length else i

    q: dict[tuple[int, int, int], tuple[float, float, float]] = {}  # of V₃: ℓ[Y], ℓ[Yʳ], ℓ[Yᶜ]
    for b, i, j in product(range(n), range(h), range(w)):
        labels = [int(y[b, i, j]), int(y[b, partner(i, h), j]), int(y[b, i, partner(j, w)])]
        if 255 not in labels:
            q[b, i, j] = tuple(float(nll[b, label, i, j]) for label in labels)
    kept = []
    for (b, i, j), losses in q.items():
        window = [q.get((b, i + u, j + v), (0.0,)) for u, v in product((-1, 0, 1), repeat=2)]
        if max(losses) >= max(map(max, window)) and max(losses) > -math.log(0.7):
            kept.append(losses)
    assert len(kept) > 5
    if supervise == "original":
        expected = sum(own for own, _, _ in kept) / len(kept)
    else:
        expected = sum(0.3 * rows + 0.6 * columns for _, rows, columns in kept) / int((y != 255).sum())
    loss = reference.boundary_corrected_loss(z, y, step=step, supervise=supervise, alpha=0.3, beta=0.6)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_cpg_by_hand() -> None:
    """Protects taps, replicate border and the mean: one vertical edge in one row, p = ½ everywhere, so Ĝ = 0 and
    |G| = 2 on 2 pixels × 2 classes, in x only."""
    z, y = torch.zeros(1, 2, 1, 6, dtype=torch.float64), torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    assert reference.cpg_loss(z, y).item() == pytest.approx(4)
    # With p₁ = [0, 0, 0, 1, 1, 1]/2 the residual is half of G.
    z = probabilities_to_logits([1e-300, 1e-300, 1e-300, 0.5, 0.5, 0.5])
    assert reference.cpg_loss(z, y).item() == pytest.approx(1)
    # k = 5 has non-zero |G| on 4 pixels: taps in a column add up to 1 + 2/2 + 2/5 and ½ + 2·2/5 + 2/4.
    near, far = 1 + 2 / 2 + 2 / 5, 1 / 2 + 2 * 2 / 5 + 2 * 2 / 8
    expected = (2 * (near + far) ** 2 + 2 * far**2) / 4
    assert reference.cpg_loss(torch.zeros_like(z), y, kernel_size=5).item() == pytest.approx(expected)


def test_sobel_taps_are_the_fractions_of_the_paper() -> None:
    """Protects exactness: the integer taps over their denominator are v/(u²+v²) and u/(u²+v²), for every k."""
    for k in (3, 5, 7):
        taps, denominator = reference.sobel_taps(k)
        for u, v in product(range(-(k // 2), k // 2 + 1), repeat=2):
            if (u, v) != (0, 0):
                assert taps[0, u + k // 2, v + k // 2] * (u * u + v * v) == denominator * v
                assert taps[1, u + k // 2, v + k // 2] * (u * u + v * v) == denominator * u
        assert taps[:, k // 2, k // 2].tolist() == [0, 0]


@pytest.mark.parametrize("ignore_mode", ["window", "centre"])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_cpg_equals_its_definition_written_as_loops(kernel_size: int, ignore_mode: str) -> None:
    """Protects every index of CPG, borders included, against the definition summed pixel by pixel."""
    n, c, h, w, r = 2, 3, 5, 6, kernel_size // 2
    z, y = noise(n, c, h, w), blocks(n, c, h, w, 2)
    y[0, 0, 0] = y[1, 4, 2] = 255
    p = z.softmax(1)
    total, count = 0.0, 0
    for b, k, i, j in product(range(n), range(c), range(h), range(w)):
        window = [
            (min(max(i + u, 0), h - 1), min(max(j + v, 0), w - 1), u, v)
            for u, v in product(range(-r, r + 1), repeat=2)
            if (u, v) != (0, 0)
        ]
        ignored = [y[b, a, e] == 255 for a, e, _, _ in window] if ignore_mode == "window" else []
        if y[b, i, j] == 255 or any(ignored):
            continue
        for dx in (True, False):
            taps = [(a, e, (v if dx else u) / (u * u + v * v)) for a, e, u, v in window]
            truth = sum(t * float(y[b, a, e] == k) for a, e, t in taps)
            if abs(truth) > 1e-9:
                total += (truth - sum(t * float(p[b, k, a, e]) for a, e, t in taps)) ** 2
                count += 1
    assert count > 20
    loss = reference.cpg_loss(z, y, kernel_size=kernel_size, ignore_mode=ignore_mode)
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# Gradients, and the two forms of CPG


@every_loss
def test_gradcheck(loss) -> None:
    """Protects the analytic gradient of every definition in fp64, with ignored pixels and resampled logits."""
    y = blocks(2, 4, 6, 9, 3)
    y[0, 0, :2] = 255
    z = noise(2, 4, 6, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y), (z,))
    small = noise(2, 4, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y, align_corners=True), (small,))


@pytest.mark.parametrize("ignore_mode", ["window", "centre"])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (2, 3), (23, 31)])
def test_sparse_cpg_equals_cpg(size: tuple[int, int], kernel_size: int, ignore_mode: str) -> None:
    """Protects the fast eager form: value and gradient equal the readable one's, below the kernel's size too."""
    z = noise(2, 5, *size).requires_grad_()
    y = blocks(2, 5, *size)
    y[0, 0, 0] = 255
    options = {"kernel_size": kernel_size, "ignore_mode": ignore_mode}
    readable, sparse = reference.cpg_loss(z, y, **options), reference.cpg_loss_sparse(z, y, **options)
    assert sparse.item() == pytest.approx(readable.item(), rel=1e-12)
    for g, expected in zip(torch.autograd.grad(sparse, z), torch.autograd.grad(readable, z), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)


# --------------------------------------------------------------------------------------------------------------------
# The criterion and its options


def test_criterion_is_the_weighted_sum_of_its_terms() -> None:
    """Protects total = ohem + λ·bcl + λ·cpg, the detached terms, and None for what was not asked for."""
    z, y = noise(2, 5, 12, 12).requires_grad_(), blocks(2, 5, 12, 12)
    weight = torch.rand(5)
    bcl, cpg = BCL(weight=0.3, step=(1, 2), threshold=0.6), CPG(kernel_size=5)
    loss = reference.segmentation_loss(z, y, weight=weight, ohem=OHEM(0.6, 3), bcl=bcl, cpg=cpg)
    assert torch.equal(loss.ce, reference.cross_entropy(z, y, weight=weight, ohem=OHEM(0.6, 3)).detach())
    assert torch.equal(loss.bcl, reference.boundary_corrected_loss(z, y, step=(1, 2), threshold=0.6).detach())
    assert loss.cpg.item() == pytest.approx(reference.cpg_loss(z, y, kernel_size=5).item(), rel=1e-12)
    assert loss.total.item() == pytest.approx((loss.ce + 0.3 * loss.bcl + 0.4 * loss.cpg).item(), rel=1e-12)
    assert loss.total.requires_grad
    assert not any(term.requires_grad for term in loss[1:] if term is not None)
    plain = reference.segmentation_loss(z, y)
    assert plain.bcl is None
    assert plain.cpg is None
    assert torch.equal(plain.total, plain.ce)


# --------------------------------------------------------------------------------------------------------------------
# Spec section 1


@every_loss
@pytest.mark.parametrize(
    "case", ["all ignored", "no image", "no pixel", "all ignored, infinite logits", "all ignored, NaN logits"]
)
def test_nothing_to_average_is_an_attached_zero(loss, case: str) -> None:
    """Protects from NaN on empty crops: exactly 0, with an all-zero gradient, attached to the graph."""
    n, h = (0 if case == "no image" else 2), (0 if case == "no pixel" else 6)
    z = torch.zeros(n, 3, h, 6)
    if "infinite" in case:
        z = z + torch.tensor([math.inf, -math.inf, 0]).view(3, 1, 1)
    if "NaN" in case:
        z = z * math.nan
    z.requires_grad_()
    value = loss(z, torch.full((n, h, 6), 255))
    value.backward()
    assert value.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("loss", [reference.cpg_loss, reference.cpg_loss_sparse], ids=["readable", "sparse"])
def test_cpg_without_an_edge_is_zero_whatever_the_logits(loss) -> None:
    """Protects flat crops (the reference code returns NaN): 0 and a zero gradient even beside an infinite logit."""
    z = torch.zeros(1, 3, 8, 8)
    z[0, 1, 3, 3] = math.inf
    z.requires_grad_()
    value = loss(z, torch.ones(1, 8, 8, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_zero_weights_are_zero() -> None:
    """Protects Σ_V w = 0: 0, not 0/0."""
    z = noise(1, 2, 3, 3).requires_grad_()
    value = reference.cross_entropy(z, torch.zeros(1, 3, 3, dtype=torch.long), weight=torch.tensor([0.0, 1.0]))
    value.backward()
    assert value.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@every_loss
def test_out_of_range_labels_raise_and_name_the_culprits(loss) -> None:
    """Protects from silent garbage: a ValueError that names the values and recognises Cityscapes' label ids."""
    y = torch.zeros(1, 4, 4, dtype=torch.uint8)
    y[0, 0, 0], y[0, 1, 1] = 33, 26
    with pytest.raises(ValueError, match=r"target holds 26, 33, .*0\.\.18.*255.*Cityscapes label ids"):
        loss(torch.zeros(1, 19, 4, 4), y)
    y[0, 0, 0] = 200  # no Cityscapes id
    with pytest.raises(ValueError, match=r"target holds 26, 200, .*255\.$"):
        loss(torch.zeros(1, 19, 4, 4), y)
    y = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"holds 255.*ignore_index is -1.*pass ignore_index=255"):
        loss(torch.zeros(1, 3, 4, 4), y, ignore_index=-1)  # uint8 with a negative ignore_index ignores nothing


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_out_of_range_labels_are_nan_where_nobody_may_look(label: int) -> None:
    """Protects traced and CUDA code, where an exception would cost a synchronisation: the loss itself says it."""
    y = torch.zeros(1, 4, 4, dtype=torch.int64)
    y[0, 1, 1] = label
    loss = torch.compile(reference.cross_entropy, backend="eager")(torch.zeros(1, 3, 4, 4), y)
    assert loss.isnan()


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["ce", "ohem", "criterion"])
def test_compiled_losses_keep_their_gradient(name: str) -> None:
    """Protects a user's compiled step under impl="torch": OHEM's host sync breaks the graph, its gradient survives."""
    y, z = blocks(1, 3, 8, 8, 2), noise(1, 3, 8, 8, dtype=torch.float32).requires_grad_()
    torch.compiler.reset()
    grads = [torch.autograd.grad(loss(z, y), z)[0] for loss in (torch.compile(LOSSES[name]), LOSSES[name])]
    torch.testing.assert_close(*grads)


@every_loss
@pytest.mark.parametrize("ignore_index", [-100, -1, 1, 255])
def test_any_ignore_index(loss, ignore_index: int) -> None:
    """Protects the meaning of ignore_index, one inside 0..C-1 included: the ignored pixels' logits do not matter."""
    y = blocks(1, 3, 8, 8, 2).clamp(max=2)
    y[y == 1] = ignore_index
    z = noise(1, 3, 8, 8)
    other = torch.where((y == ignore_index).unsqueeze(1), z + 7 * noise(1, 3, 8, 8, seed=1), z)
    if loss is LOSSES["cpg 7 centre"]:
        pytest.skip("its windows may contain ignored pixels, whose p is read")
    assert torch.equal(loss(z, y, ignore_index=ignore_index), loss(other, y, ignore_index=ignore_index))


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64])
def test_label_dtypes(loss, dtype: torch.dtype) -> None:
    """Protects labels of every integer type, also with a channel, as many loaders give them: same value, bit for
    bit."""
    z, y = noise(2, 4, 8, 8), blocks(2, 4, 8, 8, 2)
    y[0, 0] = 255
    assert torch.equal(loss(z, y.to(dtype)), loss(z, y))
    assert torch.equal(loss(z, y.to(dtype)[:, None]), loss(z, y))
    small = y.clamp(max=1)
    assert torch.equal(loss(z, small.to(torch.int8), ignore_index=-1), loss(z, small, ignore_index=-1))
    assert torch.equal(loss(z, small.bool()), loss(z, small))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_fp32(loss, dtype: torch.dtype) -> None:
    """Protects precision: half logits give the fp32 loss of the same numbers, and a gradient in their own dtype."""
    z, y = noise(2, 4, 8, 8).to(dtype).requires_grad_(), blocks(2, 4, 8, 8, 2)
    value = loss(z, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(z.float(), y))
    value.backward()
    assert z.grad.dtype == dtype


@every_loss
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (7, 5), (20, 33)])
def test_resampling_is_interpolate(loss, size: tuple[int, int], align_corners: bool) -> None:
    """Protects low-resolution logits: the loss is that of bilinearly resampled ones, up or down, at any ratio."""
    z, y = noise(2, 4, *size), blocks(2, 4, 12, 16, 3)
    full = reference.resample(z, (12, 16), align_corners)
    assert torch.equal(loss(z, y, align_corners=align_corners), loss(full, y))


def weights_of_axis(given: int, length: int, align_corners: bool) -> Tensor:
    """(length, given): how much of each entry an entry of the resampled axis is, by docs/definitions.md,
    Resampling."""
    weights = torch.zeros(length, given, dtype=torch.float64)
    for i in range(length):
        if align_corners:
            position = Fraction(i * (given - 1), max(length - 1, 1))
        else:
            position = min(
                max(Fraction((2 * i + 1) * given, 2 * length) - Fraction(1, 2), Fraction(0)), Fraction(given - 1)
            )
        first = math.floor(position)
        weights[i, first] = float(1 - (position - first))
        if position > first:
            weights[i, first + 1] = float(position - first)
    return weights


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (7, 5), (20, 33), (1, 1), (12, 2), (24, 32)])
def test_resampling(size: tuple[int, int], align_corners: bool) -> None:
    """Protects the definition of resampling: weights of exact fractions, copies of the border beyond the last centre,
    and gradients of all orders; close to what F.interpolate computes."""
    z = noise(2, 3, *size).requires_grad_()
    rows, columns = (weights_of_axis(g, n, align_corners) for g, n in zip(size, (12, 16), strict=True))
    full = reference.resample(z, (12, 16), align_corners)
    torch.testing.assert_close(full, rows @ z @ columns.T, rtol=1e-14, atol=1e-14)
    theirs = F.interpolate(z, (12, 16), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(full, theirs, rtol=1e-6, atol=1e-6)
    gradient = noise(2, 3, 12, 16, seed=1)
    torch.testing.assert_close(torch.autograd.grad(full, z, gradient)[0], rows.T @ gradient @ columns)
    for copied, kept in ((rows, 2), (columns, 3)):
        for i, weights in enumerate(copied):
            if weights.max() == 1:  # as bits: BCL compares scores
                resampled = full.select(kept, i)
                alone = reference.resample(
                    z.select(kept, int(weights.argmax())).unsqueeze(kept), (12, 16), align_corners
                )
                assert torch.equal(resampled, alone.select(kept, 0))
    few = noise(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: reference.resample(z, (5, 4), align_corners).sin(), few)


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_resampling_reads_nothing_of_weight_0(odd: float) -> None:
    """Protects a class that is masked by -inf, and whatever lies beside it: 0·∞ would be NaN."""
    z = torch.zeros(1, 1, 5, 5)
    z[0, 0, 2, 2] = odd
    for size in ((5, 9), (9, 5), (9, 9), (17, 17)):
        full = reference.resample(z, size, align_corners=True)[0, 0]
        read = [(torch.arange(n) - (n - 1) / 2).abs() < (n - 1) / 4 for n in size]
        expected = torch.where(read[0][:, None] & read[1], odd, 0.0)
        assert torch.equal(full.isfinite(), expected.isfinite())
        assert torch.equal(full.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@every_loss
def test_per_sample_gradients(loss) -> None:
    """Protects torch.func: gradients of single images by vmap, directional derivatives, and gradients of gradients, are
    those that are computed one by one."""
    z, y = noise(3, 4, 6, 7), blocks(3, 4, 12, 14, 3)
    y[0, :3] = 255

    def one(image: Tensor, labels: Tensor) -> Tensor:
        return loss(image[None], labels[None])

    alone = torch.stack([torch.func.grad(one)(image, labels) for image, labels in zip(z, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(z, y), alone)
    expected = [torch.autograd.functional.vjp(lambda image: one(image, y[i]), z[i])[1] for i in range(3)]  # noqa: B023
    torch.testing.assert_close(torch.stack(expected), alone)
    direction = noise(3, 4, 6, 7, seed=1)
    _, slope = torch.func.jvp(lambda z: loss(z, y), (z,), (direction,))
    (gradient,) = torch.autograd.grad(loss(z.requires_grad_(), y), z)
    torch.testing.assert_close(slope, (gradient * direction).sum())
    half = z.detach().bfloat16()
    assert torch.func.grad(lambda z: loss(z, y))(half).dtype == torch.bfloat16
    y[0, 6, 3] = 77  # beside an edge; and no value may be asked for
    assert torch.func.grad(lambda z: loss(z, y))(half).isnan().any()


@every_loss
def test_exports(loss) -> None:
    """Protects programs of torch.export: what is computed there does not depend on values."""

    class Module(torch.nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return loss(z, y)

    z, y = noise(2, 4, 6, 7), blocks(2, 4, 12, 14, 3)
    program = torch.export.export(Module(), (z, y))
    other, labels = noise(2, 4, 6, 7, seed=1), blocks(2, 4, 12, 14, 4, seed=1)
    torch.testing.assert_close(program.module()(other, labels), loss(other, labels))


@every_loss
def test_autocast_changes_nothing(loss) -> None:
    """Protects precision: the losses compute in fp32 themselves, also where a user calls them under autocast."""
    z, y = noise(2, 4, 6, 7).float(), blocks(2, 4, 12, 14, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(z, y)
    assert torch.equal(value, loss(z, y))


@every_loss
def test_meta_tensors(loss) -> None:
    """Protects planning without memory: a loss of tensors that have no values has the right shape, and a gradient."""
    z = torch.empty(2, 4, 6, 7, device="meta", requires_grad=True)
    value = loss(z, torch.empty(2, 12, 14, dtype=torch.uint8, device="meta"))
    assert (value.shape, value.device.type) == ((), "meta")
    value.backward()
    assert z.grad.shape == z.shape


@pytest.mark.parametrize("ohem", [None, OHEM(0.7, 5)])
def test_a_nan_at_a_pixel_of_weight_0(ohem: OHEM | None) -> None:
    """Protects agreement with the kernels: the loss shows it, and the gradient does not spread it."""
    z, y = noise(1, 3, 8, 8), blocks(1, 3, 8, 8, 2)
    y[0, 0, 0], z[0, :, 0, 0] = 1, math.nan
    z.requires_grad_()
    value = reference.cross_entropy(z, y, weight=torch.tensor([1.0, 0.0, 1.0]), ohem=ohem)
    assert value.isnan()
    assert torch.autograd.grad(value, z)[0].isfinite().all()


@every_loss
def test_a_nan_logit_shows(loss) -> None:
    """Protects the trainer's check: NaN at a valid pixel is never left out by a comparison that is false for NaN."""
    z, y = noise(1, 3, 6, 6), blocks(1, 3, 6, 6, 2)
    z[0, :, 2, 2] = math.nan  # a pixel at a label edge, so that CPG reads it too
    assert loss(z, y).isnan()


@every_loss
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(loss, scale: float) -> None:
    """Protects from overflow: finite loss and gradient at ±1e4 in fp32, as F.cross_entropy."""
    z = (noise(1, 3, 6, 6, dtype=torch.float32).sign() * scale).requires_grad_()
    value = loss(z, blocks(1, 3, 6, 6, 2))
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


@every_loss
def test_minus_infinity_in_another_class_is_fine(loss) -> None:
    """Protects masked classes: −inf in a class that no label names leaves loss and gradient finite."""
    z = noise(1, 4, 6, 6)
    z[:, 3] = -math.inf
    z.requires_grad_()
    value = loss(z, blocks(1, 3, 6, 6, 2))
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


def test_small_losses_keep_their_digits() -> None:
    """Protects (m − Z_y) + log Σ exp: at 1e4 in fp32, lse − Z_y would round a loss of 1e-4 to 0 or 1e-3."""
    z = torch.tensor([1e4, 1e4 - 9.0]).view(1, 2, 1, 1)
    expected = math.log1p(math.exp(-9))
    value = reference.cross_entropy(z, torch.zeros(1, 1, 1, dtype=torch.long))
    assert value.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("logits", "target", "error", "says"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2), TypeError, "target holds class ids"),
        (torch.zeros(1, 3, 2, 2).long(), torch.zeros(1, 2, 2).long(), TypeError, "logits are floating point"),
        (torch.zeros(3, 2, 2), torch.zeros(1, 2, 2).long(), ValueError, r"\(N, C, h, w\)"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long(), ValueError, "C >= 2"),
        (torch.zeros(2, 3, 2, 2), torch.zeros(1, 2, 2).long(), ValueError, "N = 2"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 2).long(), ValueError, r"\(N, H, W\), or \(N, 1, H, W\)"),
    ],
)
def test_wrong_inputs_get_a_sentence(logits: Tensor, target: Tensor, error: type, says: str) -> None:
    """Protects users from torch's inner errors."""
    with pytest.raises(error, match=says):
        reference.cross_entropy(logits, target)
    with pytest.raises(ValueError, match="each of the 3 classes"):
        reference.cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), weight=torch.ones(2))


# --------------------------------------------------------------------------------------------------------------------
# Bugs of the reference implementations (field notes, section 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_cpg_mask_is_not_diluted_by_rounding(kernel_size: int, dtype: torch.dtype) -> None:
    """The authors' fp32 test G ≠ 0 marks whole interiors for k = 5, 7. Here two flat halves select exactly the pixels
    within reach of the edge: with p = ½ the loss is the mean of G² over 2·r columns, in fp32 as in fp64."""
    r = kernel_size // 2
    y = torch.zeros(1, 20, 20, dtype=torch.long)
    y[..., 10:] = 1
    weight_of_column = [
        sum(v / (u * u + v * v) for u in range(-r, r + 1)) for v in range(1, r + 1)
    ]  # taps of one column, from the nearest
    g = [sum(weight_of_column[distance:]) for distance in range(r)]
    expected = sum(2 * value**2 for value in g) / (2 * r)
    for loss in (reference.cpg_loss, reference.cpg_loss_sparse):
        value = loss(torch.zeros(1, 2, 20, 20, dtype=dtype), y, kernel_size=kernel_size)
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_cpg_makes_no_edge_of_ignored_pixels() -> None:
    """The authors' code scores a single class beside ignored pixels as a boundary; "window" does not, "centre" does."""
    y = torch.zeros(1, 8, 8, dtype=torch.long)
    y[..., 5:] = 255
    z = noise(1, 2, 8, 8)
    for loss in (reference.cpg_loss, reference.cpg_loss_sparse):
        assert loss(z, y).item() == 0
        assert loss(z, y, ignore_mode="centre").item() > 0


def test_ohem_survives_what_breaks_others() -> None:
    """PIDNet: IndexError on an ignored crop. mmseg: NaN when nothing is kept, and a detached 0. Here: a kept
    pixel, or an attached zero."""
    z = torch.zeros(1, 2, 2, 2)
    z[:, 0] = 30.0  # saturated: p = 1 and ℓ = 0 in fp32
    z.requires_grad_()
    one_valid = torch.full((1, 2, 2), 255)
    one_valid[0, 0, 0] = 0
    for y in (one_valid, torch.full((1, 2, 2), 255), torch.zeros(1, 2, 2, dtype=torch.long)):
        for options in (OHEM(), OHEM(min_kept=0), OHEM(min_kept=1)):
            value = reference.cross_entropy(z, y, ohem=options)
            assert value.item() == pytest.approx(0, abs=1e-12)
            assert value.requires_grad


def test_ohem_keeps_every_pixel_when_fewer_than_min_kept() -> None:
    """HRNet drops the easiest pixel of such a batch, PIDNet indexes past the end."""
    z, y = noise(1, 3, 4, 4), blocks(1, 3, 4, 4, 2)
    value = reference.cross_entropy(z, y, ohem=OHEM(0.01, 10**6))
    assert value.item() == pytest.approx(reference.cross_entropy(z, y).item(), rel=1e-12)


def test_cross_entropy_normalises_like_pytorch() -> None:
    """HRNet's auxiliary loss keeps ignored pixels in the denominator and forgets Σw; ours equals F.cross_entropy."""
    z, y = noise(2, 5, 6, 6), blocks(2, 5, 6, 6, 2)
    y[0] = 255
    weight = torch.rand(5, dtype=torch.float64)
    expected = F.cross_entropy(z, y, weight=weight, ignore_index=255)
    assert reference.cross_entropy(z, y, weight=weight).item() == pytest.approx(expected.item(), rel=1e-12)

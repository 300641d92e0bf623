"""segmentation_loss and its terms beside the cross-entropy alone: of logits as a training gives them (`training`), of
fp32 logits at label size and at an eighth (`problems`), and of logits of many sizes (`sizes`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from problem import OURS, Contender, Problem, interpolate, make_logits, make_training_logits, our_impls, size_of, work
from torch import Tensor

from bcmf_ext import BCL, CPG, boundary_corrected_loss, cpg_loss, reference, segmentation_loss

# The dense form is the authors', with its three mistakes repaired (docs/definitions.md, CPG loss).
AUTHORS, SPARSE = reference.cpg_loss, reference.cpg_loss_sparse


@dataclass(frozen=True)
class Mix:
    """Terms of a loss, computed by PyTorch and by us. BCL and CPG have their usual settings, but for CPG's size."""

    ce: bool = True
    bcl: BCL | None = None
    cpg: CPG | None = None
    align_corners: bool = False

    def __str__(self) -> str:
        terms = ["CE"] * self.ce + ["BCL"] * bool(self.bcl) + [f"CPG{cpg.kernel_size}" for cpg in [self.cpg] if cpg]
        return " + ".join(terms)

    def eager(
        self, z: Tensor, target: Tensor, cpg_form: Callable[..., Tensor], resample: Callable[..., Tensor] = interpolate
    ) -> Tensor:
        z = resample(z, target.shape[1:], self.align_corners)  # once for all terms
        total = F.cross_entropy(z, target.long(), ignore_index=255) if self.ce else z.new_zeros(())
        if self.bcl is not None:
            total = total + self.bcl.weight * reference.boundary_corrected_loss(z, target)
        if self.cpg is not None:
            total = total + self.cpg.weight * cpg_form(z, target, kernel_size=self.cpg.kernel_size)
        return total

    def ours(self, z: Tensor, target: Tensor, impl: str) -> Tensor:
        given = {"align_corners": self.align_corners, "impl": impl}
        if self.ce:
            return segmentation_loss(z, target, bcl=self.bcl, cpg=self.cpg, **given).total
        if self.bcl is not None:
            return self.bcl.weight * boundary_corrected_loss(z, target, **given)
        assert self.cpg is not None
        return self.cpg.weight * cpg_loss(z, target, kernel_size=self.cpg.kernel_size, **given)


ALL = Mix(bcl=BCL(), cpg=CPG())


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    height, width = labels.shape[1:]
    for size in ((height, width), (height // 8, width // 8)):
        yield problem(labels, classes, size, ALL, compiled=True)
        # Apart from the others: a step takes gigabytes, and what follows it finds the memory in another state.
        yield problem(labels, classes, size, ALL, authors=True)
        for mix in (Mix(cpg=CPG(kernel_size=7)), Mix(ce=False, bcl=BCL()), Mix(ce=False, cpg=CPG())):
            yield problem(labels, classes, size, mix)


def training(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Problems as a training has them: logits in bf16 and channels_last, at an eighth with labels as most trainers keep
    them (int64) and as files do (uint8), and at the labels' size. PyTorch's contenders widen the logits first, which is
    what autocast has them do."""

    def widened(contender: Contender) -> Contender:
        return lambda z: contender(z.float())

    height, width = labels.shape[1:]
    eighth = (height // 8, width // 8)
    for size, dtype in ((eighth, torch.int64), (eighth, torch.uint8), ((height, width), torch.int64)):
        target = labels.to(dtype)
        logits = make_training_logits(target, classes, size)
        made = problem(target, classes, size, ALL)
        title = f"{ALL} in training, {size_of(logits, labels)}, bfloat16, {str(dtype).removeprefix('torch.')} labels"
        contenders = {name: run if name in OURS else widened(run) for name, run in made.contenders.items()}
        other = {name: widened(run) for name, run in made.other.items()}
        yield replace(made, title=title, input=logits, contenders=contenders, other=other, work=work(logits, target))


def sizes(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Problems at ratios of 2, 4 and 16, none that is a whole number, a single logit pixel, more logits than labels,
    and corners that are aligned."""
    height, width = labels.shape[1:]
    uneven = (height // 7 - 2, width // 9 + 3)
    for size in (*((height // k, width // k) for k in (2, 4, 16)), uneven, (1, 1), (3 * height // 2, 3 * width // 2)):
        yield problem(labels, classes, size, ALL)
    for size in ((height // 8, width // 8), uneven):
        yield problem(labels, classes, size, Mix(bcl=BCL(), cpg=CPG(), align_corners=True))


def blocks(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Problems with more edges than pictures have, where sparse work is most of all: labels of 8×8 blocks, each of one
    of eleven classes, at the given size and in one image of 64×64 pixels."""
    generator = torch.Generator(labels.device).manual_seed(0)
    for n, height, width in (tuple(labels.shape), (1, 64, 64)):
        few = torch.randint(0, 11, (n, -(-height // 8), -(-width // 8)), generator=generator, device=labels.device)
        edgy = few.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].to(torch.uint8)
        for size in ((height, width), (height // 8, width // 8)):
            made = problem(edgy, 11, size, ALL)
            yield replace(made, title=f"{made.title}, labels of 8×8 blocks")


def problem(
    labels: Tensor, classes: int, size: tuple[int, int], mix: Mix, compiled: bool = False, authors: bool = False
) -> Problem:
    logits = make_logits(labels, classes, torch.float32, size)
    authors_form, best = (partial(mix.eager, target=labels, cpg_form=form) for form in (AUTHORS, SPARSE))
    definition = partial(authors_form, resample=reference.resample)
    alone = {"CE alone": partial(cross_entropy, target=labels.long(), align_corners=mix.align_corners)}
    contenders: dict[str, Callable[[Tensor], Tensor]] = {"authors": authors_form} if authors else {"best eager": best}
    if compiled:
        contenders["compile"] = torch.compile(authors_form)
    for impl in our_impls(labels.device):
        contenders[impl] = partial(mix.ours, target=labels, impl=impl)
    title = f"{mix}{', the authors’ form' if authors else ''}, {size_of(logits, labels)}, float32"
    title += ", align_corners" if mix.align_corners else ""
    return Problem(title, logits, contenders, definition, work(logits, labels), {} if authors else alone)


def cross_entropy(z: Tensor, target: Tensor, align_corners: bool) -> Tensor:
    """The cross-entropy alone, as everybody writes it."""
    return F.cross_entropy(interpolate(z, target.shape[1:], align_corners), target, ignore_index=255)

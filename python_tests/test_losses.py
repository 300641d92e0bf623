"""The public losses: they are the reference, whatever impl runs, and the criterion adds the auxiliary head."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import inspect
from collections import OrderedDict

import numpy as np
import pytest
import torch
from harness.cases.losses import LOSSES
from torch.autograd import forward_ad

import bcmf_ext
from bcmf_ext import BCL, CPG, OHEM, SegmentationCriterion, reference

FUNCTIONS = dict.fromkeys(case.name.split()[0] for case in LOSSES)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (2, 6, 8), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    y[0, :5] = 255
    return torch.randn(2, 4, 6, 8, generator=g, dtype=torch.float64), y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_keywords_as_the_reference(name: str) -> None:
    """Protects one set of names: a public function has the reference's parameters and defaults, and impl="auto"; where
    the reference takes a term's options as a whole, they are the fields of its class, but for the weight."""
    public = {k: v.default for k, v in inspect.signature(getattr(bcmf_ext, name)).parameters.items()}
    assert public.pop("impl") == "auto"
    theirs = {k: v.default for k, v in inspect.signature(getattr(reference, name)).parameters.items()}
    if theirs.pop("options", None) is not None:
        term = {"boundary_corrected_loss": BCL, "cpg_loss": CPG}[name]
        theirs |= {field.name: field.default for field in dataclasses.fields(term) if field.name != "weight"}
    assert public == theirs


@pytest.mark.parametrize("resampled", [True, False])
def test_functions_equal_the_reference(resampled: bool) -> None:
    """Protects the hand-over of every option, whichever impl "auto" takes."""
    z, y = problem()
    y = y if resampled else y[:, ::4, ::4]
    weight = torch.rand(4, dtype=torch.float64)
    bcl = {"step": (1, 2), "supervise": "flipped", "alpha": 0.2, "beta": 0.3, "threshold": 0.9, "nms_size": 5}
    calls = {
        "cross_entropy": {"weight": weight, "ignore_index": 3},
        "boundary_corrected_loss": {**bcl, "align_corners": True},
        "cpg_loss": {"kernel_size": 5, "ignore_mode": "centre", "align_corners": True},
        "segmentation_loss": {"weight": weight, "ohem": None, "bcl": BCL(**bcl), "cpg": CPG(kernel_size=7)},
    }
    for name, options in calls.items():
        labels = torch.where(y == 255, 3, y) if name == "cross_entropy" else y
        ours, expected = (getattr(m, name)(z, labels, **options) for m in (bcmf_ext, reference))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0, msg=name)
    ohem = bcmf_ext.cross_entropy(z, y, ohem=OHEM(0.5, 10))
    expected = reference.cross_entropy(z, y, ohem=OHEM(0.5, 10))
    torch.testing.assert_close(ohem, expected, rtol=1e-12, atol=0)


def test_modules_equal_the_functions() -> None:
    """Protects the modules' constructors: each keyword reaches the function."""
    z, y = problem()
    bcl = {"step": 1, "supervise": "flipped", "alpha": 0.2, "beta": 0.3, "threshold": 0.9, "nms_size": 5}
    common = {"ignore_index": 3, "align_corners": True, "impl": "torch"}
    y = torch.where(y == 255, 3, y)
    module = bcmf_ext.BoundaryCorrectedLoss(**bcl, **common)
    assert torch.equal(module(z, y), bcmf_ext.boundary_corrected_loss(z, y, **bcl, **common))
    cpg = {"kernel_size": 5, "ignore_mode": "centre"}
    assert torch.equal(bcmf_ext.CPGLoss(**cpg, **common)(z, y), bcmf_ext.cpg_loss(z, y, **cpg, **common))
    for module_class, function in [
        (bcmf_ext.BoundaryCorrectedLoss, bcmf_ext.boundary_corrected_loss),
        (bcmf_ext.CPGLoss, bcmf_ext.cpg_loss),
    ]:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in inspect.signature(module_class).parameters.values()] == [
            (p.name, p.default) for p in keywords
        ]
    with pytest.raises(ValueError, match="kernel_size"):
        bcmf_ext.CPGLoss(kernel_size=4)
    with pytest.raises(ValueError, match="nms_size"):
        bcmf_ext.BoundaryCorrectedLoss(nms_size=4)
    with pytest.raises(ValueError, match="aux_weight"):
        bcmf_ext.SegmentationCriterion(aux_weight=float("nan"))
    with pytest.raises(TypeError, match="class weights are a tensor, not a list"):
        bcmf_ext.SegmentationCriterion(weight=[1.0, 2.0])
    with pytest.raises(TypeError, match="not 3 of them"):
        SegmentationCriterion().gradient_shares((z, z, z), y)
    with pytest.raises(TypeError, match="not 3 of them"):
        bcmf_ext.SegmentationCriterion()((torch.zeros(1, 2, 4, 4),) * 3, torch.zeros(1, 4, 4).long())


def test_criterion_adds_the_auxiliary_head() -> None:
    """Protects total = main total + aux_weight · first term of the auxiliary head, with its own entry for logging."""
    z, y = problem()
    aux = (z + 1).sin().requires_grad_()
    weight = torch.rand(4)
    criterion = bcmf_ext.SegmentationCriterion(
        weight, ohem=OHEM(0.5, 10), bcl=0.2, cpg=None, aux_weight=0.7, impl="torch"
    )
    terms = criterion.terms((z.requires_grad_(), aux), y)
    main = reference.segmentation_loss(z, y, weight=weight, ohem=OHEM(0.5, 10), bcl=0.2)
    expected_aux = reference.cross_entropy(aux, y, weight=weight, ohem=OHEM(0.5, 10))
    torch.testing.assert_close(terms["total"], main.total + 0.7 * expected_aux)
    torch.testing.assert_close(terms["aux"], expected_aux.detach())
    assert list(terms) == ["total", "ce", "bcl", "aux"]
    assert [name for name, term in terms.items() if term.requires_grad] == ["total"]
    criterion((z, aux), y).backward()
    assert aux.grad.abs().sum() > 0
    torch.testing.assert_close(criterion(z, y), main.total)
    assert "aux" not in criterion.terms(z, y)
    assert "weight" in criterion.state_dict()  # moves with .to(device)


@pytest.mark.parametrize("align_corners", [False, True])
def test_criterion_resamples_as_told(align_corners: bool) -> None:
    """Protects align_corners and ignore_index on their way to every term of both heads."""
    z, y = problem()
    low = z[:, :, ::2, ::2].contiguous()
    y[y == 255] = 1
    options = {"ignore_index": 1, "align_corners": align_corners}
    loss = bcmf_ext.SegmentationCriterion(aux_weight=1.0, impl="torch", **options)((low, 2 * low), y)
    main = reference.segmentation_loss(low, y, bcl=BCL(), cpg=CPG(), **options)
    torch.testing.assert_close(loss, main.total + reference.cross_entropy(2 * low, y, **options))


def test_criterion_defaults_are_bcl_and_cpg() -> None:
    """Protects the default criterion: CE + 0.1 BCL + 1.0 CPG₃."""
    z, y = problem()
    expected = reference.segmentation_loss(z, y, bcl=0.1, cpg=1.0)
    torch.testing.assert_close(bcmf_ext.SegmentationCriterion(impl="torch")(z, y), expected.total)


def test_ramp_scales_bcl_and_cpg() -> None:
    """Protects the warm-up of the weights: the total is CE plus so much of the others; their own values stay."""
    z, y = problem()
    criterion = SegmentationCriterion(bcl=0.4, cpg=1.0)
    full = criterion.terms(z, y)
    for ramp in (0.0, 0.25, 1.0):
        terms = criterion.terms(z, y, ramp)
        total = terms.pop("total")
        torch.testing.assert_close(total, full["ce"] + ramp * (0.4 * full["bcl"] + 1.0 * full["cpg"]))
        torch.testing.assert_close(total, criterion(z, y, ramp))
        assert all(torch.equal(term, full[name]) for name, term in terms.items())


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_gradient_shares(impl: str) -> None:
    """Protects what `--log-grad-share` shows: each weighted term's norm of the gradient at the main logits, over the
    sum of these; the logits and their graph are left alone."""
    z, y = problem()
    z.requires_grad_()
    options = {"bcl": BCL(0.7, (1, 2)), "cpg": CPG(0.3, 5), "ohem": OHEM(0.7, 10)}
    criterion = SegmentationCriterion(**options, impl=impl)
    shares = criterion.gradient_shares((z, z.detach()), y, ramp=0.5)
    terms = {
        "ce": bcmf_ext.cross_entropy(z, y, ohem=options["ohem"], impl=impl),
        "bcl": 0.35 * bcmf_ext.boundary_corrected_loss(z, y, step=(1, 2), impl=impl),
        "cpg": 0.15 * bcmf_ext.cpg_loss(z, y, kernel_size=5, impl=impl),
    }
    norms = {name: torch.autograd.grad(term, z, retain_graph=True)[0].norm() for name, term in terms.items()}
    for name, share in shares.items():
        torch.testing.assert_close(share, norms[name] / sum(norms.values()), check_dtype=False)
    assert z.grad is None
    large = z.detach().half().repeat(1, 1, 48, 48)
    half = criterion.gradient_shares(large * 8, y.repeat(1, 12, 12), 0.5)
    full = criterion.gradient_shares(large.float() * 8, y.repeat(1, 12, 12), 0.5)
    for name, share in half.items():  # whose single gradients are too small for fp16
        torch.testing.assert_close(share, full[name])
    assert all(share == 0 for share in criterion.gradient_shares(z, torch.full_like(y, 255)).values())
    assert SegmentationCriterion(bcl=None, cpg=None).gradient_shares(z, y) == {"ce": 1}


def test_flipped_labels_must_not_outweigh_the_class_weights() -> None:
    """Protects the arg-max: λ(α+β)·max w / min{w > 0} ≥ 1 is refused by the constructor; zero weights do not
    count."""
    flipped = BCL(weight=0.4, supervise="flipped")
    bcmf_ext.SegmentationCriterion(torch.tensor([1.0, 2.0, 0.0]), bcl=flipped)
    with pytest.raises(ValueError, match="outweighs"):
        bcmf_ext.SegmentationCriterion(torch.tensor([1.0, 2.5]), bcl=flipped)
    with pytest.raises(ValueError, match="leave ohem out"):
        bcmf_ext.SegmentationCriterion(ohem=0.9, bcl=flipped)


def test_compile_of_the_plain_criterion() -> None:
    """Protects a user's compiled step: the plain criterion, on low-resolution logits too, has no graph break."""
    z, y = problem()
    criterion = bcmf_ext.SegmentationCriterion(bcl=None, cpg=None)
    if bcmf_ext.dispatch.EXTENSION is None:
        pytest.skip("no extension")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, y), criterion(z, y))
    terms = torch.compile(criterion.terms, fullgraph=True, backend="aot_eager")(z, y)
    assert terms.keys() == {"total", "ce"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_reference(dtype: torch.dtype) -> None:
    """Protects the CUDA kernel: value and gradient of the reference, strided or not; NaN for a label out of range."""
    if bcmf_ext.dispatch.why_not("cuda", "cuda"):
        pytest.skip(bcmf_ext.dispatch.why_not("cuda", "cuda"))
    z = torch.randn(2, 19, 37, 53, dtype=torch.float64).to(dtype).cuda()
    y = torch.randint(0, 19, (2, 37, 53)).cuda()
    y[0, :4] = 255
    weight = torch.rand(19).cuda()
    for view in (z, z.contiguous(memory_format=torch.channels_last), z[:, :, ::2, 1:]):
        labels = y if view.shape[2:] == y.shape[1:] else y[:, ::2, 1:]
        grads, values = [], []
        for logits, impl in ((view, "cuda"), (view.double(), "torch")):
            logits = logits.detach().requires_grad_()
            values.append(bcmf_ext.cross_entropy(logits, labels, weight=weight, impl=impl))
            grads.append(torch.autograd.grad(2 * values[-1], logits)[0])
        torch.testing.assert_close(values[0].double(), values[1], rtol=1e-6, atol=0)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=2 * eps + 2e-6, atol=1e-8)
    y[0, 10, 10] = 77
    z = z.detach().requires_grad_()
    value = bcmf_ext.cross_entropy(z, y, impl="cuda")
    value.backward()
    assert value.isnan()
    assert z.grad[0, :, 10, 10].isnan().all()


class TinyNetwork(torch.nn.Module):
    """Main and auxiliary logits at a quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Tanh(), torch.nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.main, self.aux = torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(x).tanh()
        return self.main(features), self.aux(features)


def trained(impl: str, dtype: torch.dtype, steps: int) -> list[torch.Tensor]:
    """The losses of some steps, and the weights after them."""
    torch.manual_seed(0)
    network = TinyNetwork().to(dtype)
    criterion = bcmf_ext.SegmentationCriterion(impl=impl)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    labels = torch.randint(0, 4, (2, 8, 9)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :3, :5] = 255
    images = torch.nn.functional.one_hot(labels % 4, 4)[..., :3].movedim(-1, 1).to(dtype) + torch.rand(2, 3, 32, 36)
    losses = []
    for _ in range(steps):
        loss = criterion(network(images.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(parameter.detach() for parameter in network.parameters())]


@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 20, 1e-6), (torch.float32, 1, 1e-5)])
def test_training_is_the_same_with_kernels_and_with_pytorch(dtype: torch.dtype, steps: int, tolerance: float) -> None:
    """Protects training as a whole: the default criterion on both heads' low-resolution logits, step after step."""
    if bcmf_ext.dispatch.EXTENSION is None:
        pytest.skip("no extension")
    for ours, theirs in zip(trained("cpu", dtype, steps), trained("torch", dtype, steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# As users have things


def test_outputs_as_networks_return_them() -> None:
    """Logits, (main, auxiliary) logits, and the mappings of torchvision and Transformers give one loss; what holds no
    logits is refused by a sentence."""
    z, y = problem()
    aux, criterion = z.cos()[:, :, ::2], SegmentationCriterion()
    pair, alone = criterion((z, aux), y), criterion(z, y)
    assert pair > alone
    assert criterion([z, aux], y) == criterion(OrderedDict(out=z, aux=aux), y) == pair
    assert criterion({"logits": z, "loss": None}, y) == criterion({"out": z, "aux": None}, y) == alone
    shares = criterion.gradient_shares({"out": z}, y)
    assert shares == criterion.gradient_shares(z, y)
    with pytest.raises(TypeError, match='logits as "out" or "logits", but these have last_hidden_state'):
        criterion({"last_hidden_state": z}, y)
    with pytest.raises(TypeError, match="logits are a tensor, not a NoneType"):
        criterion(None, y)  # type: ignore[arg-type]


def test_labels_as_loaders_give_them() -> None:
    """Labels with a channel, bool ones, and every integer dtype, by kernels as by PyTorch."""
    z, y = problem()
    for impl in ("auto", "torch"):
        criterion = SegmentationCriterion(impl=impl)
        expected = criterion(z, y)
        for labels in (y[:, None], y.byte()[:, None], y.to(torch.uint16), y.to(torch.uint32), y.to(torch.uint64)):
            assert criterion(z, labels) == expected
        few = y.clamp(max=1)
        assert criterion(z, few.bool()) == criterion(z, few.to(torch.int8)) == criterion(z, few)


def test_numbers_as_users_have_them() -> None:
    """NumPy's numbers are numbers; what is none is a sentence of the constructor, and never an op's schema."""
    z, y = problem()
    criterion = SegmentationCriterion(
        ohem=OHEM(np.float32(0.5), np.prod((4, 4))),
        bcl=BCL(np.float64(0.1), np.int64(2), nms_size=np.int8(3)),
        cpg=CPG(kernel_size=np.int32(3)),
        aux_weight=np.float16(0.5),
        ignore_index=np.uint8(255),
    )
    plain = SegmentationCriterion(ohem=OHEM(0.5, 16), bcl=0.1, aux_weight=0.5)
    assert criterion((z, z), y) == plain((z, z), y)
    assert criterion.bcl == BCL(0.1)
    for wrong, says in (
        ({"ignore_index": None}, "ignored pixels, not None: pass -1"),
        ({"ignore_index": 255.0}, r"ignore_index is a whole number, not 255.0 \(float\)"),
        ({"ignore_index": [255]}, "ignore_index is a whole number"),
        ({"aux_weight": "0.4"}, "aux_weight is a number, not '0.4'"),
        ({"aux_weight": None}, "aux_weight is a number, not None"),
        ({"cpg": True}, "cpg is None, a number or CPG"),
        ({"align_corners": "no"}, "align_corners is True or False, not 'no'"),
    ):
        with pytest.raises(TypeError, match=says):
            SegmentationCriterion(**wrong)
    for wrong, says in (
        ({"ignore_index": 2**70}, "no label has more than 64 bits"),
        ({"aux_weight": 2**2000}, "aux_weight is an endless number"),
        ({"impl": "cudnn"}, "impl='cudnn': there is no such impl"),
        ({"impl": None}, "impl=None: there is no such impl"),
    ):
        with pytest.raises(ValueError, match=says):
            SegmentationCriterion(**wrong)
    for ramp in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="ramp is a share of the weights"):
            SegmentationCriterion(bcl=None, cpg=None)(z, y, ramp)
    for make in (bcmf_ext.CPGLoss, bcmf_ext.BoundaryCorrectedLoss):
        with pytest.raises(TypeError, match=r"ignore_index is a whole number, not 255\.0"):
            make(ignore_index=255.0)
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match="ignored pixels, not None"):
            getattr(bcmf_ext, function)(z, y, ignore_index=None)


def test_what_is_not_built_yet() -> None:
    """Room in the signatures is no promise: a sentence says what is not there."""
    z, y = problem()
    for call in (SegmentationCriterion, lambda **options: bcmf_ext.segmentation_loss(z, y, **options)):
        with pytest.raises(ValueError, match="group is None"):
            call(group=True)


class Dice(torch.nn.Module):
    """With a parameter, as learnt losses have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.scale * logits.softmax(1).square().mean()


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_extra_losses(impl: str) -> None:
    """Protects losses of others beside ours: they get logits of the labels' size in fp32, outside autocast, and int64
    labels with what is ignored; their weights and the ramp count; modules move with the criterion."""
    z, y = problem()
    given = []

    def focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        given.append((logits, target))
        assert not torch.is_autocast_enabled("cpu")
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=255).square()

    dice = Dice()
    criterion = SegmentationCriterion(extra={"focal": (0.5, focal), "dice": (2, dice)}, impl=impl)
    plain = SegmentationCriterion(impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        terms = criterion.terms((z, z), y[:, None].to(torch.int16), ramp=0.5)
    logits, labels = given.pop()
    assert logits.shape == (*z.shape[:2], *y.shape[1:])
    assert torch.equal(labels, y)
    assert labels.dtype == torch.int64
    full = reference.resample(z, y.shape[1:])
    torch.testing.assert_close(terms["focal"], focal(full, y))
    torch.testing.assert_close(terms["dice"], dice(full, y).detach())
    ours = plain((z, z), y, ramp=0.5)
    torch.testing.assert_close(terms["total"], ours + 0.25 * terms["focal"] + terms["dice"])
    terms["total"].backward()
    torch.testing.assert_close(dice.scale.grad, terms["dice"] / dice.scale.detach())
    assert list(criterion.parameters()) == [dice.scale]
    assert [name for name, term in terms.items() if term.requires_grad] == ["total"]
    assert set(criterion.gradient_shares(z, y)) == {"ce", "bcl", "cpg", "focal", "dice"}
    half = SegmentationCriterion(extra={"focal": (0.5, focal)}, impl=impl)(z.bfloat16(), y)
    assert half.dtype == given.pop()[0].dtype == torch.float32
    assert copy.deepcopy(criterion).extra["dice"][1] is not dice

    def careless(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target[target == 255] = 0
        return logits.detach().clamp_(max=-9).mean()

    same, labels = z.detach().repeat(1, 1, 4, 4).float(), y.clone()
    both = SegmentationCriterion(extra={"x": (1, careless), "focal": (1, focal)}, impl=impl).terms(same, labels)
    assert torch.equal(labels, y)
    assert torch.equal(same, z.detach().repeat(1, 1, 4, 4).float())
    assert (given.pop()[1] == 255).any()
    assert both["x"] == -9
    shape, meta = torch.empty(1, 4, 6, 8, device="meta"), torch.empty(1, 12, 16, dtype=torch.uint8, device="meta")
    assert SegmentationCriterion(extra={"x": (1, lambda z, y: z.mean())})(shape, meta).is_meta
    nothing = SegmentationCriterion(extra={"x": (1, lambda z, y: z[0, 0, :0].exp())})  # of an empty crop
    assert nothing(z, torch.full_like(y, 255)) == 0
    for wrong, error, says in (
        ({"bcl": (0.5, focal)}, ValueError, "'bcl' has the name of a term of ours"),
        ({"x": focal}, TypeError, r"'x' is \(weight, function\)"),
        ({"x": (-1, focal)}, ValueError, "weight of the extra loss 'x' is a number of at least 0"),
        ({"x": (None, focal)}, TypeError, "weight of the extra loss 'x' is a number, not None"),
        ({3: (1, focal)}, TypeError, "name of an extra loss is a text, not 3"),
        ([focal], TypeError, "extra is a mapping of names"),
    ):
        with pytest.raises(error, match=says):
            SegmentationCriterion(extra=wrong)
    for wrong in (lambda z, y: z.mean((2, 3)), lambda z, y: 0.5):
        with pytest.raises(TypeError, match=r"'x' returns a scalar tensor, not .*: take the mean"):
            SegmentationCriterion(extra={"x": (1, wrong)})(z, y)


def test_a_loss_shows_how_it_is_set() -> None:
    """`print(criterion)` is what one looks at first."""
    shown = repr(SegmentationCriterion(torch.tensor([1.0, 2.0]), ohem=0.7, ignore_index=9, aux_weight=0.25))
    for part in ("weight=[1.0, 2.0]", "OHEM(threshold=0.7", "BCL(weight=0.1", "ignore_index=9", "aux_weight=0.25"):
        assert part in shown
    assert "step=(1, 2)" in repr(bcmf_ext.BoundaryCorrectedLoss(step=(1, 2)))
    assert "kernel_size=5" in repr(bcmf_ext.CPGLoss(kernel_size=5))


def test_transforms_of_the_kernels() -> None:
    """torch.func and forward mode say what to do where kernels run; PyTorch's own path takes them (test_reference)."""
    z, y = problem()
    if bcmf_ext.dispatch.EXTENSION is None:
        pytest.skip("no extension")
    criterion = SegmentationCriterion()
    for transform in (
        lambda: torch.func.grad(lambda z: criterion(z, y))(z),
        lambda: torch.func.jvp(lambda z: criterion(z, y), (z,), (z,)),
        lambda: torch.func.vmap(lambda z, y: criterion(z[None], y[None]))(z, y),
        lambda: _forward_mode(criterion, z, y),
    ):
        with pytest.raises(NotImplementedError, match="use impl='torch'"):
            transform()
    torch_criterion = SegmentationCriterion(impl="torch")
    _forward_mode(torch_criterion, z, y)
    together = torch.func.vmap(torch.func.grad(lambda z, y: torch_criterion(z[None], y[None])))(z, y)
    alone = [torch.func.grad(lambda z: torch_criterion(z[None], y[i : i + 1]))(z[i]) for i in range(2)]  # noqa: B023
    torch.testing.assert_close(together, torch.stack(alone))


def _forward_mode(criterion: SegmentationCriterion, z: torch.Tensor, y: torch.Tensor) -> None:
    with forward_ad.dual_level():
        value = criterion(forward_ad.make_dual(z, torch.ones_like(z)), y)
        slope = forward_ad.unpack_dual(value).tangent
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        criterion(leaf, y).backward()
    torch.testing.assert_close(slope, leaf.grad.sum())


def test_the_package_tells_its_version() -> None:
    """As every package does; and memory is given back with or without an extension."""
    assert bcmf_ext.__version__ == importlib.metadata.version("bcmf_ext")
    bcmf_ext.release_kept_memory()

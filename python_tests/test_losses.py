"""The public losses: they are the reference, whatever impl runs, and the criterion adds the auxiliary head."""

from __future__ import annotations

import inspect

import pytest
import torch

import bcmf_ext
from bcmf_ext import BCL, CPG, OHEM, SegmentationCriterion, reference

FUNCTIONS = ("cross_entropy", "boundary_corrected_loss", "cpg_loss", "segmentation_loss")


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (2, 6, 8), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    y[0, :5] = 255
    return torch.randn(2, 4, 6, 8, generator=g, dtype=torch.float64), y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_keywords_as_the_reference(name: str) -> None:
    """Protects one set of names: a public function has the reference's parameters and defaults, and impl="auto"."""
    public = dict(inspect.signature(getattr(bcmf_ext, name)).parameters)
    assert public.pop("impl").default == "auto"
    assert {k: v.default for k, v in public.items()} == {
        k: v.default for k, v in inspect.signature(getattr(reference, name)).parameters.items()
    }


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

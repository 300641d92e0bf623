"""The networks: published size and cost, names, wiring, any input size, and sentences for what cannot work."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness.files import DDRNET_KEYS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bcmf_ext.models import NETWORKS, DDRNet, bcmfnet, ddrnet_s, scr_ddrnet_s, scr_resnet18
from bcmf_ext.nn import SRM

MODELS = pytest.mark.parametrize("build", [ddrnet_s, bcmfnet])


@pytest.fixture(scope="module")
def net() -> DDRNet:
    """A BCMFNet with six classes. Tests leave it as they found it, batch norm statistics aside."""
    torch.manual_seed(0)
    return bcmfnet(6)


def images(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


# Size, cost and names


@pytest.mark.parametrize(
    ("build", "aux_head", "parameters"),
    [
        (ddrnet_s, False, 5_695_987),
        (ddrnet_s, True, 5_734_342),
        (bcmfnet, False, 5_612_787),
        (bcmfnet, True, 5_651_142),
        (scr_ddrnet_s, False, 5_714_408),
        (scr_ddrnet_s, True, 5_752_763),
        (scr_resnet18, False, 11_970_206),
        (scr_resnet18, True, 12_119_537),
    ],
)
def test_parameters(build: Any, aux_head: bool, parameters: int) -> None:
    """The networks have exactly the published number of parameters at 19 classes (docs/definitions.md, Networks and
    their training)."""
    with torch.device("meta"):
        model = build(aux_head=aux_head)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("build", "gmacs"), [(ddrnet_s, 36.281), (bcmfnet, 36.239), (scr_ddrnet_s, 37.274), (scr_resnet18, 116.592)]
)
def test_gmacs(build: Any, gmacs: float) -> None:
    """The published cost at 1024×2048. Counted are the multiply-adds of the convolutions, as the literature does:
    flop_counter's figure halved; it leaves out batch norm, ReLU, pooling, resampling and additions."""
    with torch.device("meta"):
        model, x = build().eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=5e-4)


def test_keys_of_the_public_checkpoints() -> None:
    """Names, shapes and order of the state dict are those of the public DDRNet-23-slim."""
    own = [f"{name} {tuple(tensor.shape)}" for name, tensor in ddrnet_s().state_dict().items()]
    assert own == DDRNET_KEYS.read_text().splitlines()


def test_bcmfnet_differs_from_ddrnet_in_the_context_module_alone() -> None:
    """What is not ``spp`` has the same names and shapes in both, and the auxiliary head can be left out of either."""
    shapes = [
        {name: t.shape for name, t in build(aux_head=False).state_dict().items() if not name.startswith("spp.")}
        for build in (ddrnet_s, bcmfnet)
    ]
    assert shapes[0] == shapes[1]
    assert not any(name.startswith("seghead_extra") for name in shapes[0])


def test_names_of_torchvisions_resnet18() -> None:
    """Protects the ImageNet weights, which load by name: the trunk has the 122 names of torchvision's ResNet-18 but for
    the classifier's two."""
    names = {"conv1.weight", *norm_names("bn1")}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            for i in (1, 2):
                names |= {f"layer{stage}.{block}.conv{i}.weight", *norm_names(f"layer{stage}.{block}.bn{i}")}
        if stage > 1:
            names |= {f"layer{stage}.0.downsample.0.weight", *norm_names(f"layer{stage}.0.downsample.1")}
    own = {name for name in scr_resnet18().state_dict() if name.startswith(("conv1", "bn1", "layer"))}
    assert own == names
    assert len(names) == 120


def norm_names(name: str) -> set[str]:
    return {f"{name}.{t}" for t in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def test_scr_ddrnet_begins_as_bcmfnet() -> None:
    """Protects who refines a trained BCMFNet: all of its tensors fit by name, and the network then computes the same,
    in training and in eval mode. CRM's gain gets a gradient at once, so that the CRM joins in at the second step."""
    torch.manual_seed(0)
    before, after = bcmfnet(5), scr_ddrnet_s(5)
    new = after.load_state_dict(before.state_dict(), strict=False)
    assert not new.unexpected_keys
    assert {name.split(".")[0] for name in new.missing_keys} == {"srm", "crm", "crm_gain"}
    x = images(2, 3, 97, 130)
    torch.testing.assert_close(after.eval()(x), before.eval()(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(after.train()(x), before.train()(x), rtol=0, atol=1e-5)
    main, aux = after(x)
    (main.square().mean() + aux.square().mean()).backward()
    assert after.crm_gain.grad is not None
    assert after.crm_gain.grad.abs().min() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_the_protocol(name: str) -> None:
    """Protects those who add a network: whatever the trainer, checkpoints and the Predictor ask for (`Network`), each
    entry of NETWORKS offers, without or with its auxiliary head, which no main logit depends on."""
    network = NETWORKS[name](5, aux_head=True, impl="torch")
    assert isinstance(network, nn.Module)
    outputs, head = network.train()(images(2, 3, 65, 100)), network.auxiliary_head
    assert isinstance(outputs, tuple) == (head is not None)
    main = outputs[0] if isinstance(outputs, tuple) else outputs
    assert all(logits.shape[:2] == (2, 5) for logits in ((main, outputs[1]) if head is not None else (main,)))
    auxiliary = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    everything = {id(parameter) for parameter in network.parameters()}
    expected = network.eval()(images(2, 3, 65, 100))
    assert expected.shape == main.shape
    network.drop_auxiliary_head()
    assert network.auxiliary_head is None
    assert {id(parameter) for parameter in network.parameters()} == everything - auxiliary
    assert torch.equal(network(images(2, 3, 65, 100)), expected)
    assert isinstance(network.train()(images(2, 3, 65, 100)), Tensor)
    assert NETWORKS[name](5, aux_head=False, impl="torch").state_dict().keys() == network.state_dict().keys()
    for module in network.modules():
        for convolution, norm in getattr(module, "norm_after", {}).items():
            assert isinstance(getattr(module, convolution), nn.Conv2d)
            assert isinstance(getattr(module, norm), nn.BatchNorm2d)


# Wiring


class Layers:
    """Layers in eval mode, straight from the tensors of a state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (self.state[f"{name}.{t}"] for t in ("weight", "bias", "running_mean", "running_var"))
        return F.batch_norm(x, mean, var, weight, bias)

    def conv_bn(self, x: Tensor, name: str, at: int = 0, stride: int = 1) -> Tensor:
        """Entries ``at`` and ``at + 1`` of a sequence."""
        return self.bn(self.conv(x, f"{name}.{at}", stride), f"{name}.{at + 1}")

    def block(self, x: Tensor, name: str, stride: int = 1, strided: int = 1) -> Tensor:
        """A residual block of two or three convolutions, of which the one called ``strided`` strides."""
        y, depth = x, 3 if f"{name}.conv3.weight" in self.state else 2
        for i in range(1, depth + 1):
            y = self.bn(self.conv(y, f"{name}.conv{i}", stride if i == strided else 1), f"{name}.bn{i}")
            y = y.relu() if i < depth else y
        if f"{name}.downsample.0.weight" in self.state:
            x = self.conv_bn(x, f"{name}.downsample", stride=stride)
        return y + x

    def stage(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return self.block(self.block(x, f"{name}.0", stride).relu(), f"{name}.1")

    def head(self, x: Tensor, name: str) -> Tensor:
        x = self.conv(self.bn(x, f"{name}.bn1").relu(), f"{name}.conv1")
        return self.conv(self.bn(x, f"{name}.bn2").relu(), f"{name}.conv2")


def ddrnet_by_definition(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(main, aux) logits in eval mode, from the public layer table; the context module, SRM and CRM, which have tests
    of their own, are the model's."""
    net = Layers(model.state_dict())
    conv_bn, stage, block = net.conv_bn, net.stage, net.block

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, l2.shape[2:], mode="bilinear", align_corners=False)

    x = conv_bn(images, "conv1", stride=2).relu()
    x = conv_bn(x, "conv1", 3, stride=2).relu()
    l2 = stage(stage(x, "layer1").relu(), "layer2", 2).relu()
    l3, h3 = stage(l2, "layer3", 2), stage(l2, "layer3_")
    low3 = (l3 + conv_bn(h3.relu(), "down3", stride=2)).relu()
    high = h3 + up(conv_bn(l3.relu(), "compression3"))
    aux = net.head(high, "seghead_extra")
    l4, h4 = stage(low3, "layer4", 2), stage(high.relu(), "layer4_")
    low4 = (l4 + conv_bn(conv_bn(h4.relu(), "down4", stride=2).relu(), "down4", 3, stride=2)).relu()
    high = (h4 + up(conv_bn(l4.relu(), "compression4"))).relu()
    context = model.spp(block(low4, "layer5.0", 2, strided=2))
    details = block(high, "layer5_.0")
    if not hasattr(model, "srm"):
        return net.head(up(context) + details, "final_layer"), aux
    fused = model.srm(high, context, details) + model.crm_gain * model.crm(high, low3, low4, context)
    return net.head(fused, "final_layer"), aux


def resnet_by_definition(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of scr_resnet18."""
    net = Layers(model.state_dict())
    x = F.max_pool2d(net.bn(net.conv(images, "conv1", 2), "bn1").relu(), 3, 2, 1)
    stages = []
    for i in range(1, 5):
        x = net.stage(x, f"layer{i}", 1 if i == 1 else 2).relu()
        stages.append(x)
    refined = model.crm(*stages)
    for i in (3, 2, 1):
        refined = net.conv_bn(model.get_submodule(f"srm{i}")(stages[i - 1], refined), f"smooth{i}").relu()
    return net.head(refined, "final_layer"), net.head(stages[2], "seghead_extra")


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_wiring(build: Any) -> None:
    """Both logits equal a second writing of the layer table: strides, which maps are fused before which ReLU, and from
    where the auxiliary head reads. Statistics and affine parameters are random, offsets and gains are not 0: no two
    layers can be swapped."""
    torch.manual_seed(0)
    model = build(5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, SRM):
            nn.init.normal_(module.offset.weight, 0, 0.1)
    if hasattr(model, "crm_gain"):
        nn.init.normal_(model.crm_gain)
    x = images(2, 3, 65, 97).double()
    by_definition = resnet_by_definition if build is scr_resnet18 else ddrnet_by_definition
    expected = by_definition(model.eval(), x)
    frozen = model.train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(model.eval()(x), expected[0])


def test_initialisation() -> None:
    """A fresh network knows nothing and says so: its loss is near ln C, and the context does not drown the details.
    Kaiming-normal by fan-out fails both, and trains far more slowly from scratch."""
    torch.manual_seed(0)
    model = ddrnet_s().train()
    summands: dict[str, Tensor] = {}
    for name in ("spp", "layer5_"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: summands.update({name: y}))
    main, aux = model(images(4, 3, 128, 192))
    for logits in (main, aux):
        assert logits.std(dim=1).mean() < 0.5
    assert summands["spp"].std() < summands["layer5_"].std()


def test_outputs_by_mode(net: DDRNet) -> None:
    """(main, aux) in training, main alone in eval mode or without an auxiliary head."""
    x = images(2, 3, 64, 64)
    assert isinstance(net.train()(x), tuple)
    assert isinstance(net.eval()(x), Tensor)
    assert isinstance(bcmfnet(6, aux_head=False).train()(x), Tensor)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """No layer is left out of the graph (DDP would wait for it for ever), and all gradients are finite."""
    torch.manual_seed(0)
    model = NETWORKS[name](6).train()
    main, aux = model(images(2, 3, 64, 96))
    (main.square().mean() + aux.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# Any size (reference implementations floor H/8 where their convolutions ceil, and crash)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (127, 191), (64, 333), (33, 7), (1, 1)])
def test_any_input_size(name: str, size: tuple[int, int]) -> None:
    """Any size works in both modes, odd ones and ones below one cell of the 1/64 map too; sizes are rounded up."""
    model, x, (main, aux) = NETWORKS[name](6), images(2, 3, *size), (4, 16) if name == "scr_resnet18" else (8, 8)
    for y, scale in zip((*model.train()(x), model.eval()(x)), (main, aux, main), strict=True):
        assert y.shape == (2, 6, -(-size[0] // scale), -(-size[1] // scale))
        assert y.isfinite().all()


@MODELS
def test_sizes_that_crash_the_reference(build: Any) -> None:
    """361×481 and 500×500, where the reference adds maps of H // 8 and ceil(H / 8) rows."""
    model = build(6).eval()
    with torch.inference_mode():
        assert model(images(1, 3, 361, 481)).shape == (1, 6, 46, 61)
        assert model(images(1, 3, 500, 500)).shape == (1, 6, 63, 63)


# Platforms


def test_plain_batch_norm(net: DDRNet) -> None:
    """No SyncBatchNorm inside: the official file has it throughout and cannot run on a CPU."""
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last(name: str) -> None:
    """channels_last gives the same logits and keeps the layout to the end."""
    torch.manual_seed(0)
    x, model = images(2, 3, 128, 160), NETWORKS[name](6).eval()
    expected = model(x)
    y = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast(name: str) -> None:
    """Autocast works, and its logits stay near the fp32 ones."""
    torch.manual_seed(0)
    x, net = images(2, 3, 128, 128), NETWORKS[name](6).eval()
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_compiles_in_one_graph(net: DDRNet) -> None:
    """The checks of the input break no graph: it compiles as one, and a batch of one still gets its sentence."""
    model = copy.deepcopy(net).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    reference = copy.deepcopy(model)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), reference(x))
    with pytest.raises(ValueError, match="at least two images"):
        torch.compile(model, backend="eager")(x[:1])
    torch.compiler.reset()


def test_exports_with_dynamic_sizes(net: DDRNet) -> None:
    """torch.export takes the eval model with free batch, height and width, and the program is right at another size.
    From 513 pixels on, that is: up to 512 the widest pool leaves one cell, and torch.export specialises on a 1."""
    model = copy.deepcopy(net).eval()
    n, h, w = torch.export.Dim("n", max=64), *(torch.export.Dim(d, min=513, max=4096) for d in "hw")
    program = torch.export.export(model, (torch.empty(2, 3, 576, 640),), dynamic_shapes=({0: n, 2: h, 3: w},))
    x = images(1, 3, 513, 530)
    torch.testing.assert_close(program.module()(x), model(x))


# Sentences


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (torch.zeros(3, 64, 64), r"\(N, 3, H, W\), not \(3, 64, 64\).*image\[None\]"),
        (torch.zeros(2, 64, 64, 3), r"not \(2, 64, 64, 3\).*channels come second"),
        (torch.zeros(2, 1, 64, 64), r"not \(2, 1, 64, 64\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), r"floating-point images, not torch\.uint8: divide by 255"),
    ],
    ids=["no batch", "channels last", "grey", "uint8"],
)
def test_wrong_images(net: DDRNet, wrong: Tensor, match: str) -> None:
    """Images of another shape or dtype are refused in a sentence that says what to do."""
    with pytest.raises(TypeError if wrong.dtype == torch.uint8 else ValueError, match=match):
        net.eval()(wrong)


@MODELS
def test_training_with_one_image(build: Any) -> None:
    """The global pool leaves batch norm one value per channel, and PyTorch's traceback tells nobody so: a sentence,
    before any statistics change. In eval mode one image is what everyone uses."""
    model = build(3).train()
    with pytest.raises(ValueError, match="at least two images per device"):
        model(images(1, 3, 64, 64))
    assert model.conv1[1].num_batches_tracked == 0
    assert model.eval()(images(1, 3, 64, 64)).shape == (1, 3, 8, 8)


def test_one_image_with_frozen_batch_norm() -> None:
    """Batch norm in eval mode needs no statistics, so fine-tuning with one image works."""
    model = bcmfnet(3).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    main, aux = model(images(1, 3, 64, 64))
    assert main.shape == aux.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("initialised", "world_size", "copes"), [(False, 0, False), (True, 1, False), (True, 2, True)])
def test_one_image_with_synchronised_batch_norm(
    monkeypatch: pytest.MonkeyPatch, initialised: bool, world_size: int, copes: bool
) -> None:
    """SyncBatchNorm shares statistics, so one image per process is enough once there are several of them. (It runs on
    GPUs only, hence the check alone here.)"""
    monkeypatch.setattr(dist, "is_initialized", lambda: initialised)
    monkeypatch.setattr(dist, "get_world_size", lambda group: world_size)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(bcmfnet(3)).train()
    assert isinstance(model.spp.scale4[1], nn.SyncBatchNorm)
    with contextlib.nullcontext() if copes else pytest.raises(ValueError, match="at least two images"):
        model._check(images(1, 3, 64, 64))

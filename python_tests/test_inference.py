"""The Predictor: what it makes of a trained network, and that labels stay what they are."""

from __future__ import annotations

import copy
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bcmf_ext.checkpoint import VERSION, save_checkpoint
from bcmf_ext.config import make_config
from bcmf_ext.data import MEAN, STD, normalise
from bcmf_ext.errors import UserError
from bcmf_ext.inference import Captured, Graphs, InferenceNetwork, Predictor, fold_batch_norms
from bcmf_ext.models import NETWORKS

networks = pytest.mark.parametrize("name", NETWORKS)


def trained(name: str, classes: int = 11) -> nn.Module:
    """A network whose batch norms are not as they were made, so that its maps have the size of a trained one's."""
    torch.manual_seed(0)
    network = NETWORKS[name](classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0.0, 0.2)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 3, 64, 128))
    return network.eval()


def write_run(folder: Path, name: str, network: nn.Module, classes: int = 11, **about: object) -> Path:
    content = {
        "version": VERSION,
        "config": asdict(make_config({"dataset": "folder", "model": name, "amp": "off"})),
        "classes": [f"class {index}" for index in range(classes)],
        "palette": torch.zeros(classes, 3, dtype=torch.uint8),
        "mean": MEAN,
        "std": STD,
        "align_corners": False,
        "model": network.state_dict(),
        **about,
    }
    save_checkpoint(folder / "best.pt", content)
    return folder


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """A uint8 image with areas, as of a camera, not noise."""
    noise = torch.rand(batch, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth).byte()


@networks
@pytest.mark.parametrize("size", [(96, 160), (65, 101)], ids=str)
def test_predictor_is_the_network(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Protects what users deploy: in fp32 logits are the trained network's within 1e-5 of the largest, and labels the
    same at 99.99 % of the pixels, for sizes that are no multiple of 8, too."""
    network = trained(name)
    predictor = Predictor(write_run(tmp_path / name, name, network), device="cpu")
    images = picture(*size)
    with torch.no_grad():
        expected = network(normalise(images))
    logits = predictor.logits(images)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels = F.interpolate(expected, size, mode="bilinear").argmax(1)
    found = predictor(images[0].permute(1, 2, 0).numpy())
    assert found.dtype == np.uint8
    assert (torch.from_numpy(found) == labels[0]).double().mean() >= 0.9999
    assert len(labels.unique()) > 1


@networks
def test_half_precision(tmp_path: Path, name: str) -> None:
    """Protects bf16: convolutions run in it, norms that remain stay in fp32, and labels are nearly the same."""
    folder = write_run(tmp_path / name, name, trained(name))
    exact, half = Predictor(folder, "cpu"), Predictor(folder, "cpu", amp="bf16")
    parts = [module for module in half.network.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    expected = {nn.Conv2d: torch.bfloat16, nn.BatchNorm2d: torch.float32}
    assert all(part.weight.dtype == expected[type(part)] for part in parts)
    assert any(isinstance(part, nn.Conv2d) for part in parts)
    images = picture(96, 160)
    assert half.logits(images).dtype == torch.bfloat16
    assert (half.labels(images) == exact.labels(images)).double().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "in_context", "folded"),
    [("bcmfnet", 10, 43), ("ddrnet_s", 11, 43), ("scr_ddrnet_s", 10, 45), ("scr_resnet18", 0, 30)],
)
def test_norms_are_folded(name: str, in_context: int, folded: int) -> None:
    """Protects speed: only those norms remain that no convolution directly precedes, and the auxiliary head is gone."""
    network = trained(name)
    before = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    fast = InferenceNetwork(copy.deepcopy(network), MEAN, STD)
    left = [n for n, module in fast.network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    context = [n for n in left if n.startswith("spp.")]
    after_sums = ["crm.norm"] if "crm.norm" in left else []
    assert sorted(n for n in left if n not in context) == [*after_sums, "final_layer.bn1"]
    assert len(context) == in_context
    assert before - len(left) == folded + 2  # of the auxiliary head
    assert fast.network.auxiliary_head is None
    assert all(conv.bias is not None for conv in fast.network.layer1.modules() if isinstance(conv, nn.Conv2d))


def test_every_pair_is_found() -> None:
    """Protects folding: what a block says of its norms is what its forward does, also if it is changed; eps counts."""
    network = trained("bcmfnet")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    before = copy.deepcopy(network)
    fold_batch_norms(network)
    for module, twin in zip(network.modules(), before.modules(), strict=False):
        for conv, norm in getattr(module, "norm_after", {}).items():
            assert isinstance(getattr(module, norm), nn.Identity)
            assert getattr(twin, conv).out_channels == getattr(twin, norm).num_features
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(network(images), before(images), rtol=1e-4, atol=1e-4)


def test_mean_and_corners_of_the_checkpoint(tmp_path: Path) -> None:
    """Protects from another normalisation or resampling than the network was trained with; resampling is in fp32, where
    bf16 would tie."""
    network = trained("bcmfnet")
    images = picture(64, 96)
    plain = Predictor(write_run(tmp_path / "a", "bcmfnet", network), "cpu")
    other = {"mean": (0.0, 0.1, 0.9), "std": (0.5, 0.1, 2.0), "align_corners": True}
    changed = Predictor(write_run(tmp_path / "b", "bcmfnet", network, **other), "cpu", amp="bf16")
    mean, std = (torch.tensor(other[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network((images / 255 - mean) / std)
    logits = changed.logits(images)
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    assert (plain.logits(images) - expected).abs().max() > 0.1 * expected.abs().max()
    resampled = F.interpolate(logits.float(), (64, 96), mode="bilinear", align_corners=True)
    assert torch.equal(changed.labels(images).long(), resampled.argmax(1))


def test_batches_and_devices_of_images(tmp_path: Path) -> None:
    """Protects `labels` for more than one image, each as if it were alone."""
    predictor = Predictor(write_run(tmp_path, "bcmfnet", trained("bcmfnet")), "cpu")
    images = picture(64, 96, batch=3)
    labels = predictor.labels(images)
    assert labels.shape == (3, 64, 96)
    alone = torch.cat([predictor.labels(image[None]) for image in images])
    assert (labels == alone).double().mean() > 0.999


class Counting(Graphs):
    """With a stand-in for capturing, which takes a GPU."""

    captured = 0

    def _capture(self, images: Tensor):  # type: ignore[no-untyped-def]
        self.captured += 1
        given, out = images.clone(), self.network(images)

        class Replay:
            def replay(self) -> None:
                time.sleep(1e-4)  # for other threads to come in between
                out.copy_(2 * given)

        return Captured(Replay(), given, out, types.SimpleNamespace(wait=int, record=int, synchronize=int))


def test_graphs_are_captured_for_sizes_that_come_again() -> None:
    """Protects folders of images of all sizes: a size is captured when it comes again, the last few are kept, and a
    result is not written over by the next one."""
    graphs = Counting(lambda x: 2 * x)  # type: ignore[arg-type]
    sizes = [torch.full((1, 3, 4, width), 1.0) for width in range(1, 20)]
    for x in sizes:
        assert torch.equal(graphs(x), 2 * x)
    assert graphs.captured == 0
    first = graphs(sizes[-1])
    second = graphs(5 * sizes[-1])
    assert graphs.captured == 1
    assert first[0, 0, 0, 0] == 2
    assert second[0, 0, 0, 0] == 10
    assert len(graphs._captured) == Graphs.MOST
    for x in (*sizes[:3], *sizes[:3], *sizes):  # captured ones are dropped, too
        assert torch.equal(graphs(x), 2 * x)
    assert graphs.captured == 4


def test_threads_share_graphs() -> None:
    """Protects servers: a graph has one place for images, and no thread gets another one's logits."""
    graphs = Counting(lambda x: 2 * x)  # type: ignore[arg-type]

    def all_right(thread: int) -> bool:
        images = (torch.full((1, 3, 4, 4), float(100 * thread + i)) for i in range(50))
        return all(torch.equal(graphs(x), 2 * x) for x in images)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_right, range(4)))


def test_images_as_users_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from quiet nonsense: an image with its channels turned round (OpenCV's BGR) is read as it is, others
    than uint8 of three channels are refused, and autocast around a Predictor changes nothing. The network gets its
    images in channels_last, as its weights are."""
    predictor = Predictor(write_run(tmp_path, "bcmfnet", trained("bcmfnet")), "cpu")
    image = picture(64, 96)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(predictor(image[..., ::-1]), predictor(image[..., ::-1].copy()))
    assert np.array_equal(predictor(Image.fromarray(image)), predictor(image))
    assert np.array_equal(predictor(Image.fromarray(image).convert("RGBA")), predictor(image))
    turned = Image.fromarray(image)
    turned.getexif()[0x0112] = 6  # a quarter turn, as of a telephone held upright
    assert np.array_equal(predictor(turned), predictor(np.rot90(image, -1)))
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match=f"more than 8 bits per channel .mode {mode}"):
            predictor(Image.new(mode, (64, 64)))
    for wrong in ("street.png", picture(64, 96)[0]):
        with pytest.raises(
            TypeError, match=r"\(H, W, 3\) uint8 images, or PIL pictures, not a .*read_image reads a file"
        ):
            predictor(wrong)
    with pytest.raises(TypeError, match="not a ndarray"):
        predictor.labels(image)
    images = picture(64, 96, 2)
    for wrong in (images / 255, images[0], images[:, :1], images.long()):
        with pytest.raises(ValueError, match=r"takes uint8 images \(N, 3, H, W\), not "):
            predictor.labels(wrong)
    expected = predictor.logits(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor.logits(images), expected)
    convolutions = [module for module in predictor.network.modules() if isinstance(module, nn.Conv2d)]
    given: list[Tensor] = []
    for conv in convolutions:
        conv.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    predictor.logits(images)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in given)
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Protects from a page of names of weights: a sentence says what the file claims, and the first thing that is
    wrong."""
    network = trained("bcmfnet")
    for name, classes, message in (
        ("bcmfnet", 12, r"a bcmfnet of 12 classes, but its weights are others \(size mismatch for .*conv2"),
        ("ddrnet_s", 11, r"a ddrnet_s of 11 classes, but its weights are others \(Missing key\(s\).*spp.scale0"),
        ("unet", 11, "the setting model is 'unet', and this version knows only bcmfnet, ddrnet_s"),
    ):
        folder = write_run(tmp_path / f"{name}{classes}", "bcmfnet", network, classes)
        saved = torch.load(folder / "best.pt", weights_only=True)
        torch.save({**saved, "config": {**saved["config"], "model": name}}, folder / "best.pt")
        with pytest.raises(UserError, match=message):
            Predictor(folder, "cpu")


@pytest.mark.gpu
@networks
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_graph_on_a_gpu(tmp_path: Path, name: str, amp: str) -> None:
    """Protects CUDA graphs: replayed logits are those of the first, plain pass, for each image."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    predictor = Predictor(write_run(tmp_path, name, trained(name)), "cuda", amp)
    images = [picture(96, 160), 255 - picture(96, 160)]
    with torch.inference_mode():
        plain = [predictor.network(image.cuda().contiguous(memory_format=torch.channels_last)) for image in images]
    for _ in range(3):
        for image, expected in zip(images, plain, strict=True):
            torch.testing.assert_close(predictor.logits(image), expected)


@pytest.mark.gpu
def test_a_frame_may_be_written_over(tmp_path: Path) -> None:
    """Protects cameras that write the next frame into the same pinned memory: a Predictor has read it when it returns,
    also when the GPU is behind, with a CUDA graph and, for the first frame, without."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = write_run(tmp_path, "bcmfnet", trained("bcmfnet"))
    predictor, other = Predictor(folder, "cuda"), Predictor(folder, "cuda")
    pictures = [picture(96, 160), 255 - picture(96, 160)] * 3
    expected = [other.logits(image.cuda()) for image in pictures]
    frame = torch.empty_like(pictures[0]).pin_memory()
    found = []
    for image in pictures:
        frame.copy_(image)
        torch.cuda._sleep(10**7)
        found.append(predictor.logits(frame))
        frame.zero_()
    for logits, of_picture in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, of_picture)

"""Augmentation: the geometry of image and label, padding, colours, purity; the samplers; normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bcmf_ext.data import (
    MEAN,
    STD,
    Augmentation,
    EpochSampler,
    EvalSamples,
    SegmentationDataset,
    TrainSamples,
    normalise,
    transforms,
)
from bcmf_ext.errors import UserError

MEAN_COLOUR = [124, 116, 104]


def plain(crop: tuple[int, int], scale: float) -> Augmentation:
    """Scale and crop alone."""
    return Augmentation(crop, (scale, scale), flip=False, colour_jitter=0)


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 19, (height, width), dtype=np.uint8)


def ramp(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image whose red is x and whose green is y, and labels that are x and y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([x, y, x], -1), x.copy(), y.copy()


def test_nothing_to_do_changes_nothing() -> None:
    """At scale 1 with a crop of the image's size, every pixel comes back as it was."""
    image, label = noise(37, 53)
    out_image, out_label = plain((37, 53), 1)(image, label, np.random.default_rng(0))
    assert (out_image == image).all()
    assert (out_label == label).all()


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.6, 2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_image_and_label_stay_aligned(scale: float, mirrored: bool) -> None:
    """The label shows the source pixel that lies under the centre of the output pixel, where the image was sampled.

    Pixel centres are at half-integers: an output pixel sampled at source position u shows floor(u) in the label and
    u - 0.5 in the image. Their difference lies in ±0.5 and is 0 on average; half a pixel of shift would show as ±0.5.
    """
    image, x, y = ramp(120, 150)
    augmentation = Augmentation((48, 60), (scale, scale), flip=True, colour_jitter=0)
    differences = []
    for seed in range(40):
        for channel, label in ((0, x), (1, y)):
            out_image, out_label = augmentation(image, label, np.random.default_rng(seed))
            red = out_image[..., 0].astype(int)
            if (red[0, 0] > red[0, -1]) == mirrored:
                difference = out_image[..., channel].astype(float) - out_label
                differences.append(difference[4:-4, 4:-4])
    assert len(differences) > 20
    difference = np.stack(differences)
    assert abs(difference.mean()) < 0.1
    assert np.abs(difference).max() <= 1.01  # 0.5, and the image's rounding to integers


@pytest.mark.parametrize("scale", [0.5, 0.77, 1.0, 2.0])
def test_cropping_first_equals_resizing_the_whole(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only part of the source is resized, yet every pixel is what a resize of the whole image would give."""
    image, label = noise(90, 110)
    augmentation = plain((40, 40), scale)
    crops = [augmentation(image, label, np.random.default_rng(seed)) for seed in range(5)]
    monkeypatch.setattr(transforms, "_needed", lambda span, source: (0, source))
    for seed, (some_image, some_label) in enumerate(crops):
        whole_image, whole_label = augmentation(image, label, np.random.default_rng(seed))
        assert np.abs(some_image.astype(int) - whole_image).max() <= 1  # Pillow keeps box corners in single precision
        assert (some_label == whole_label).mean() > 0.999


def test_only_the_pixels_of_the_crop_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of a large image does not pay for the whole image."""
    read: list[int] = []
    fromarray = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda pixels: read.append(pixels[..., 0].size) or fromarray(pixels))
    plain((64, 64), 2)(*noise(512, 1024), np.random.default_rng(0))
    assert max(read) <= 40 * 40


def test_downscaling_averages() -> None:
    """At scale 0.5 fine stripes become grey, not aliased stripes."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = 255
    out, _ = plain((32, 32), 0.5)(image, image[..., 0], np.random.default_rng(0))
    assert np.abs(out[4:-4, 4:-4].astype(int) - 128).max() < 35


def test_crops_reach_every_part() -> None:
    """Crops lie anywhere: the first and the last column and row of the source turn up."""
    image, x, _ = ramp(30, 40)
    crops = [plain((10, 10), 1)(image, x, np.random.default_rng(seed))[0] for seed in range(400)]
    columns, rows = np.stack([c[..., 0] for c in crops]), np.stack([c[..., 1] for c in crops])
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 39, 0, 29)


@pytest.mark.parametrize(("size", "scale"), [((20, 30), 1.0), ((60, 30), 1.0), ((20, 90), 1.0), ((40, 60), 0.5)])
def test_short_sides_are_padded(size: tuple[int, int], scale: float) -> None:
    """Where the scaled image is smaller than the crop, the rest is the mean colour, ignored, and nothing is lost."""
    image, label = noise(*size)
    out_image, out_label = plain((48, 64), scale)(image, label, np.random.default_rng(3))
    assert out_image.shape == (48, 64, 3)
    ignored = out_label == 255
    height, width = (min(crop, round(n * scale)) for crop, n in zip((48, 64), size, strict=True))
    assert (~ignored).sum() == height * width
    assert (out_image[ignored] == MEAN_COLOUR).all()
    assert (~ignored).any(0).sum() == width
    assert (~ignored).any(1).sum() == height


def test_small_images_lie_anywhere_in_the_crop() -> None:
    """Not always in the same corner: the network shall not learn where padding is."""
    image, label = noise(30, 40)
    tops = {
        int((plain((48, 64), 1)(image, label, np.random.default_rng(seed))[1] != 255).any(1).argmax())
        for seed in range(99)
    }
    assert tops >= {0, 18}


def test_padding_is_not_jittered() -> None:
    """Padding is exactly the mean colour, which normalises to 0, also when the image's colours are changed."""
    image, label = noise(20, 20)
    out_image, out_label = Augmentation((32, 32), (1, 1), colour_jitter=0.5)(image, label, np.random.default_rng(0))
    assert (out_image[out_label == 255] == MEAN_COLOUR).all()


def test_flips_one_time_in_two() -> None:
    """Image and label are mirrored together, about every other time."""
    image, x, _ = ramp(24, 32)
    augmentation = Augmentation((24, 32), (1, 1), colour_jitter=0)
    mirrored = 0
    for seed in range(100):
        out_image, out_label = augmentation(image, x, np.random.default_rng(seed))
        assert (out_image[..., 0] == out_label).all()
        mirrored += int(out_label[0, 0] == 31)
    assert 30 < mirrored < 70


def test_jitter_changes_colours_alone() -> None:
    """Two draws differ in the image and agree in the label; its mean factor is 1."""
    image, label = noise(32, 32)
    image = image // 2 + 64
    augmentation = Augmentation((32, 32), (1, 1), flip=False, colour_jitter=0.3)
    outs = [augmentation(image, label, np.random.default_rng(seed)) for seed in range(200)]
    assert all((out[1] == label).all() for out in outs)
    means = np.array([out[0].mean() for out in outs])
    assert means.std() > 10
    assert abs(means.mean() - image.mean()) < 6


def test_the_colour_matrix() -> None:
    """Identity at 1, 1, 1; brightness scales; contrast turns about mid-grey; saturation 0 leaves the luma."""
    picture = Image.fromarray(noise(8, 8)[0])

    def apply(*factors: float) -> np.ndarray:
        return np.array(picture.convert("RGB", transforms._colour_matrix(*factors))).astype(float)

    source = np.array(picture).astype(float)
    assert (apply(1, 1, 1) == source).all()
    np.testing.assert_allclose(apply(0.5, 1, 1), source * 0.5, atol=1)
    grey = float(np.array([0.299, 0.587, 0.114]) @ MEAN_COLOUR)
    np.testing.assert_allclose(apply(1, 0.5, 1), grey + 0.5 * (source - grey), atol=1)
    luma = source @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(apply(1, 1, 0), luma[..., None].repeat(3, -1), atol=1)


def test_inputs_stay_as_they_are() -> None:
    """Cached scenes are augmented again and again."""
    image, label = noise(32, 32)
    before = image.copy(), label.copy()
    Augmentation((24, 24), (0.5, 2))(image, label, np.random.default_rng(0))
    assert (image == before[0]).all()
    assert (label == before[1]).all()


class Noise(SegmentationDataset):
    """Eleven noise images of different sizes."""

    name, split, classes = "noise", "train", tuple("abcdefghijklmnopqrs")

    def __len__(self) -> int:
        return 11

    def stem(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> np.ndarray:
        return noise(24 + index, 40, index)[0]

    def label(self, index: int) -> np.ndarray:
        return noise(24 + index, 40, index)[1]


def test_training_samples_are_pure() -> None:
    """A sample depends on seed, epoch and index, and on nothing else: not on what was asked for before."""
    first = TrainSamples(Noise(), Augmentation((16, 24)), seed=5)
    second = TrainSamples(Noise(), Augmentation((16, 24)), seed=5)
    second[0, 7]
    image, label = first[3, 2]
    again, again_label = second[3, 2]
    assert torch.equal(image, again)
    assert torch.equal(label, again_label)
    assert (image.shape, image.dtype) == ((3, 16, 24), torch.uint8)
    assert (label.shape, label.dtype) == ((16, 24), torch.uint8)
    assert not torch.equal(image, first[4, 2][0])
    assert not torch.equal(image, TrainSamples(Noise(), Augmentation((16, 24)), seed=6)[3, 2][0])


def test_evaluation_samples_are_whole() -> None:
    """Every pixel of image and label, channels first; a split without labels is refused."""
    dataset = Noise()
    image, label = EvalSamples(dataset)[4]
    assert (image.permute(1, 2, 0).numpy() == dataset.image(4)).all()
    assert (label.numpy() == dataset.label(4)).all()
    dataset.has_labels = False
    with pytest.raises(UserError, match="no labels"):
        EvalSamples(dataset)


def test_epoch_sampler() -> None:
    """Each epoch is its own permutation in full batches, the same whenever it is asked for."""
    sampler = EpochSampler(11, 4, seed=0)
    assert len(sampler) == 2
    seen = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [4, 4]
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({i for _, i in keys} & {*range(11)}) == 8
        seen.append([i for _, i in keys])
    assert seen[0] == seen[2] != seen[1]
    assert seen[0] != [i for batch in EpochSampler(11, 4, seed=1) for _, i in batch]
    with pytest.raises(UserError, match="`batch_size=3`"):
        EpochSampler(3, 4, seed=0)


def test_epoch_sampler_goes_on_within_an_epoch() -> None:
    """After `start` batches come exactly those that were left, and the next epoch is whole again."""
    sampler = EpochSampler(40, 4, seed=0)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start=7)
    assert list(sampler) == whole[7:]
    sampler.set_epoch(3)
    assert len(list(sampler)) == len(sampler) == 10


def test_worker_processes_do_not_change_the_batches() -> None:
    """With workers that live through the epochs the same batches come as without: the epoch travels with the index."""
    samples = TrainSamples(Noise(), Augmentation((16, 24)), seed=1)

    def batches(workers: int) -> list[torch.Tensor]:
        sampler = EpochSampler(len(samples), 4, seed=1)
        loader = DataLoader(samples, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        found = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            found += [image for image, _ in loader]
        return found

    alone, helped = batches(0), batches(2)
    assert len(alone) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalise(layout: torch.memory_format) -> None:
    """(x / 255 - mean) / std in float32, in the layout that came; the mean colour becomes almost 0."""
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8).to(memory_format=layout)
    before = images.clone()
    out = normalise(images)
    wanted = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    padding = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(padding).abs().max() < 0.01

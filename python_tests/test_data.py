"""Data sets on disk: what is found where, which ids become which classes, and the sentences for what is wrong."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import files
from harness.pngs import COLOUR_TYPES, png
from PIL import Image, TiffImagePlugin

from bcmf_ext.data import DATASETS, SegmentationDataset, open_dataset
from bcmf_ext.data import cityscapes as cityscapes_module
from bcmf_ext.data.classes import palette_for, read_classes
from bcmf_ext.data.listing import find_files
from bcmf_ext.data.pictures import read_image, read_label
from bcmf_ext.errors import UserError

SIZE = (12, 20)  # height, width of the tiny images


def write(path: Path, pixels: np.ndarray | int, mode: str | None = None) -> Path:
    """Saves pixels, or a flat picture of one id, as the format that the extension says."""
    pixels = np.full(SIZE, pixels, np.uint8) if isinstance(pixels, int) else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def ids(*values: int) -> np.ndarray:
    """A label whose rows hold the values in turn."""
    return np.resize(np.array(values, np.uint8), SIZE[0])[:, None].repeat(SIZE[1], 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/ and labels/ with train (2, one of them in a subfolder) and val (1), three classes."""
    (tmp_path / "classes.txt").write_text("ground\nwall\nsky\n")
    for key in ("train/a", "train/sub/b", "val/c"):
        write(tmp_path / f"images/{key}.png", photo())
        write(tmp_path / f"labels/{key}.png", ids(0, 1, 2, 255))
    return tmp_path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Twenty images without train/ and val/."""
    (tmp_path / "classes.txt").write_text("ground\nwall\n")
    for i in range(20):
        write(tmp_path / f"images/frame_{i:03}.png", photo(i))
        write(tmp_path / f"labels/frame_{i:03}.png", ids(0, 1))
    return tmp_path


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for stem in ("x_01", "x_02"):
            write(tmp_path / split / f"{stem}.jpg", photo())
            write(tmp_path / f"{split}annot" / f"{stem}.png", ids(*range(12)))
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities in train, one in val, one in test, with labelIds as downloaded."""
    for place in ("train/ulm/ulm_000001_000019", "train/bonn/bonn_000002_000019", "val/kiel/kiel_000003_000019"):
        write(tmp_path / f"leftImg8bit/{place}_leftImg8bit.png", photo())
        write(tmp_path / f"gtFine/{place}_gtFine_labelIds.png", np.arange(240, dtype=np.uint8).reshape(SIZE) % 34)
    write(tmp_path / "leftImg8bit/test/rom/rom_000004_000019_leftImg8bit.png", photo())
    return tmp_path


def sentence(call: Callable[[], object], *needles: str) -> None:
    """The call raises a `UserError` that is one sentence and holds the needles."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.endswith("."), message
    for needle in needles:
        assert needle in message, message


# Cityscapes


def test_cityscapes_label_ids_become_train_ids(cityscapes: Path) -> None:
    """The 19 evaluated ids map in order, all others are ignored: the mapping that everyone has to get right."""
    train = open_dataset("cityscapes", cityscapes, "train")
    assert len(train) == 2
    label = train.label(0).ravel()[:34]
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert label[evaluated].tolist() == list(range(19))
    assert (np.delete(label, evaluated) == 255).all()
    assert "labelIds" in train.protocol
    assert train.classes[13] == "car"


def test_cityscapes_tables_are_the_official_ones() -> None:
    """Names, colours and both id tables equal cityscapesScripts'."""
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="cityscapesscripts is not installed").labels
    official = [label for label in labels if 0 <= label.trainId < 255]
    assert tuple(label.name for label in official) == cityscapes_module.CLASSES
    assert cityscapes_module.PALETTE.tolist() == [list(label.color) for label in official]
    assert cityscapes_module.TRAIN_ID_TO_LABEL_ID[:19].tolist() == [label.id for label in official]
    assert not cityscapes_module.TRAIN_ID_TO_LABEL_ID[19:].any()
    for label in labels:
        if label.id >= 0:
            assert cityscapes_module._LABEL_ID_TO_TRAIN_ID[label.id] == label.trainId


def test_cityscapes_predictions_map_back(cityscapes: Path) -> None:
    """Train ids written through the inverse table read back as the same classes."""
    val = open_dataset("cityscapes", cityscapes, "val")
    train_ids = val.label(0)
    write(cityscapes / "gtFine/val/kiel/kiel_000003_000019_gtFine_labelIds.png",
          cityscapes_module.TRAIN_ID_TO_LABEL_ID[train_ids])  # fmt: skip
    assert (val.label(0) == train_ids).all()


def test_cityscapes_accepts_train_id_files(cityscapes: Path) -> None:
    """labelTrainIds are read as they are, and only where a split has no labelIds."""
    place = "gtFine/val/kiel/kiel_000003_000019_gtFine"
    write(cityscapes / f"{place}_labelTrainIds.png", ids(18, 0, 255))
    assert 18 not in open_dataset("cityscapes", cityscapes, "val").label(0)[0]
    (cityscapes / f"{place}_labelIds.png").unlink()
    val = open_dataset("cityscapes", cityscapes, "val")
    assert (val.label(0) == ids(18, 0, 255)).all()
    assert "labelTrainIds" in val.protocol


def test_cityscapes_label_ids_in_a_train_id_file_are_recognised(cityscapes: Path) -> None:
    """The classic mistake is told as such, with the file, the ids and how many pixels have them."""
    place = cityscapes / "gtFine/val/kiel/kiel_000003_000019_gtFine_labelIds.png"
    wrong = place.rename(place.with_name("kiel_000003_000019_gtFine_labelTrainIds.png"))
    val = open_dataset("cityscapes", cityscapes, "val")
    sentence(lambda: val.label(0), str(wrong), "19 (7 px)", "look like Cityscapes label ids")


def test_cityscapes_stems_begin_as_the_evaluator_wants(cityscapes: Path) -> None:
    """cityscapesScripts finds predictions by <city>_<seq>_<frame>*: no folder, no other prefix."""
    stems = {open_dataset("cityscapes", cityscapes, "train").stem(i) for i in range(2)}
    assert stems == {"ulm_000001_000019_leftImg8bit", "bonn_000002_000019_leftImg8bit"}


def test_cityscapes_test_has_no_labels(cityscapes: Path) -> None:
    """The blank labels of the test split never become a score, even where they were unpacked."""
    write(cityscapes / "gtFine/test/rom/rom_000004_000019_gtFine_labelIds.png", 0)
    test = open_dataset("cityscapes", cityscapes, "test")
    assert not test.has_labels
    assert test.image(0).shape == (*SIZE, 3)
    test.check()
    sentence(lambda: test.label(0), "no labels")


def test_cityscapes_root_from_the_environment(cityscapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CITYSCAPES_DATASET serves where no root is given, as with the official tools; a given root wins."""
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    sentence(lambda: open_dataset("cityscapes", None, "val"), "`root=DIR`", "CITYSCAPES_DATASET")
    monkeypatch.setenv("CITYSCAPES_DATASET", str(cityscapes))
    assert len(open_dataset("cityscapes", None, "val")) == 1
    monkeypatch.setenv("CITYSCAPES_DATASET", "/nowhere")
    assert len(open_dataset("cityscapes", cityscapes, "val")) == 1


# CamVid


def test_camvid_pairs_by_stem_and_ignores_void(camvid: Path) -> None:
    """JPEG images go with PNG labels of the same stem; 0 to 10 stay, void 11 becomes 255."""
    train = open_dataset("camvid", camvid, "train")
    assert [train.stem(i) for i in range(len(train))] == ["x_01", "x_02"]
    assert train.label(0)[:, 0].tolist() == [*range(11), 255]
    assert "SegNet" in train.protocol
    assert len(train.classes) == len(train.palette) == 11
    train.check()


def test_camvid_has_no_test_split_unless_it_is_there(camvid: Path) -> None:
    """A copy with train and val alone works; asking for test tells which folder is missing."""
    sentence(lambda: open_dataset("camvid", camvid, "test"), str(camvid / "test"))


def test_camvid_of_32_classes_is_recognised(camvid: Path) -> None:
    """Labels of the original CamVid are told apart from SegNet's."""
    path = write(camvid / "trainannot/x_01.png", ids(3, 17))
    train = open_dataset("camvid", camvid, "train")
    sentence(lambda: train.label(0), str(path), "17 (120 px)", "32 classes")


def test_camvid_real_data() -> None:
    """The real copy: split sizes, picture size, and labels that hold all 11 classes and void."""
    train, val = (open_dataset("camvid", files.camvid(), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    image, label = train.pair(0)
    assert image.shape == (360, 480, 3)
    road = image[label == train.classes.index("road")].mean(0)
    sky = image[label == train.classes.index("sky")].mean(0)
    assert (sky > road + 50).all()
    present = set().union(*(np.unique(val.label(i)).tolist() for i in range(0, len(val), 10)))
    assert present == {*range(11), 255}


# Folder


def test_folder_mirrors_subfolders(folder: Path) -> None:
    """images/train/sub/b.png goes with labels/train/sub/b.png, and its stem is a plain file name."""
    train, val = open_dataset("folder", folder, "train"), open_dataset("folder", folder, "val")
    assert [train.stem(i) for i in range(len(train))] == ["a", "sub__b"]
    assert (train.label(1) == ids(0, 1, 2, 255)).all()
    assert len(val) == 1
    assert train.classes == ("ground", "wall", "sky")
    train.check()


def test_folder_holds_out_one_in_five(flat: Path) -> None:
    """Without train/ and val/, every image is in exactly one split, the choice is repeatable, and the log tells."""
    train, val = open_dataset("folder", flat, "train"), open_dataset("folder", flat, "val")
    names = [{split.stem(i) for i in range(len(split))} for split in (train, val)]
    assert (len(names[0]), len(names[1])) == (16, 4)
    assert not names[0] & names[1]
    assert names[1] == {f"frame_{i:03}" for i in (5, 6, 7, 9)}, "the same images on every machine and for good"
    assert "4 of 20 held out" in val.protocol
    sentence(lambda: open_dataset("folder", flat, "test"), "test")


def test_folder_hold_out_hardly_moves_when_images_are_added(flat: Path) -> None:
    """Images that were trained on stay out of val when the folder grows, but for the few that fill it up."""
    before = {item.key for item in open_dataset("folder", flat, "val").files}  # type: ignore[attr-defined]
    for i in range(20, 25):
        write(flat / f"images/frame_{i:03}.png", photo(i))
        write(flat / f"labels/frame_{i:03}.png", ids(0, 1))
    after = {item.key for item in open_dataset("folder", flat, "val").files}  # type: ignore[attr-defined]
    new = {f"frame_{i:03}" for i in range(20, 25)}
    assert len(after) == 5
    assert len(after - before - new) <= 1


def test_folder_test_split_may_lack_labels(folder: Path) -> None:
    """images/test without labels/test can be predicted."""
    write(folder / "images/test/t.png", photo())
    test = open_dataset("folder", folder, "test")
    assert (len(test), test.has_labels) == (1, False)
    write(folder / "labels/test/t.png", ids(0, 1))
    assert open_dataset("folder", folder, "test").has_labels


def test_classes_txt_with_colours(folder: Path) -> None:
    """`name r g b` sets a colour, names may hold blanks and digits, other classes get colours of their own."""
    (folder / "classes.txt").write_text("\ufeffroad 1 2 3\nroute 66\r\ntraffic light 255 0 9\n", encoding="utf-8")
    train = open_dataset("folder", folder, "train")
    assert train.classes == ("road", "route 66", "traffic light")
    assert train.palette[[0, 2]].tolist() == [[1, 2, 3], [255, 0, 9]]
    assert train.palette[1].tolist() == palette_for(3)[1].tolist()


def test_reduce_zero_label(folder: Path) -> None:
    """Id 0 is ignored, the others move down, 255 stays ignored: classes.txt names ids 1, 2, …"""
    write(folder / "labels/val/c.png", ids(0, 1, 3, 255))
    val = open_dataset("folder", folder, "val", reduce_zero_label=True)
    assert (val.label(0) == ids(255, 0, 2, 255)).all()
    sentence(lambda: open_dataset("demo", None, "val", reduce_zero_label=True), "takes no `reduce_zero_label`")


def test_palette_is_distinct_for_any_count() -> None:
    """254 different colours, none black (that is what ignored pixels look like), beginning as PASCAL VOC's do."""
    palette = palette_for(254)
    assert len({tuple(colour) for colour in palette.tolist()} - {(0, 0, 0)}) == 254
    assert palette[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert (palette_for(5) == palette[:5]).all()


# Label files of every kind


@pytest.mark.parametrize("kind", ["L", "P", "16-bit", "1-bit"])
def test_label_modes(folder: Path, kind: str) -> None:
    """Grey, palette, 16-bit and 1-bit files hold the same ids: colours of a palette do not matter."""
    wanted = ids(0, 1) if kind == "1-bit" else ids(0, 1, 2, 255)
    if kind == "P":
        picture = Image.fromarray(wanted).convert("P")
        picture = Image.frombytes("P", picture.size, wanted.tobytes())
        picture.putpalette([255, 0, 0, 0, 255, 0] * 128)
        picture.save(folder / "labels/val/c.png")
    elif kind == "16-bit":
        write(folder / "labels/val/c.png", wanted.astype(np.uint16))
    else:
        write(folder / "labels/val/c.png", wanted * (255 if kind == "1-bit" else 1), {"1-bit": "1"}.get(kind))
    label = open_dataset("folder", folder, "val").label(0)
    assert label.dtype == np.uint8
    assert (label == wanted).all()


def test_images_of_any_mode_become_rgb(folder: Path) -> None:
    """Grey, palette and RGBA images are read as RGB; pixels are writable and not shared."""
    for mode in ("L", "P", "RGBA"):
        write(folder / "images/val/c.png", photo(), mode)
        image = open_dataset("folder", folder, "val").image(0)
        assert (image.shape, image.dtype) == ((*SIZE, 3), np.uint8)
        assert image.flags.writeable


@pytest.mark.parametrize(
    ("pixels", "classes", "needles"),
    [
        (photo(), 3, ["colour picture (mode RGB)"]),
        (ids(0, 3), 3, ["3 (120 px)", "3 classes", "`reduce_zero_label=True`"]),
        (ids(0, 4, 5), 3, ["4 (80 px), 5 (80 px)", "may lack a line"]),
        (ids(7, 26, 33), 19, ["26 (80 px), 33 (80 px)", "Cityscapes label ids"]),
        (np.arange(240, dtype=np.uint8).reshape(SIZE), 3, ["3 (1 px), 4 (1 px), 5 (1 px), 6 (1 px) …", "grey picture"]),
        (np.full(SIZE, 26001, np.uint16), 3, ["26001 (240 px)", "instance ids"]),
    ],
    ids=["colours", "off by one", "class count", "cityscapes", "grey picture", "16-bit"],
)
def test_unexpected_ids_name_the_likely_cause(
    folder: Path, pixels: np.ndarray, classes: int, needles: list[str]
) -> None:
    """The error names the file, the ids with their pixel counts, and what has probably gone wrong."""
    (folder / "classes.txt").write_text("\n".join(f"class {i}" for i in range(classes)))
    path = write(folder / "labels/val/c.png", pixels)
    val = open_dataset("folder", folder, "val")
    sentence(lambda: val.label(0), str(path), *needles)
    sentence(val.check, str(path), *needles)


# What is missing or broken


def damage(root: Path, how: str) -> None:
    """Spoils the tree of the fixture `folder` in one way."""
    image, label = root / "images/train/a.png", root / "labels/train/a.png"
    if how == "no classes.txt":
        (root / "classes.txt").unlink()
    elif how == "one class":
        (root / "classes.txt").write_text("ground\n")
    elif how == "empty line":
        (root / "classes.txt").write_text("ground\n\nwall\nsky\n")
    elif how == "flat images beside test":
        (root / "images" / "train").rename(root / "images" / "test")
        shutil.rmtree(root / "images" / "val")
    elif how == "class twice":
        (root / "classes.txt").write_text("ground\nwall\nground\n")
    elif how == "bad colour":
        (root / "classes.txt").write_text("ground 0 0 256\nwall\nsky\n")
    elif how == "binary classes.txt":
        (root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    elif how == "no images folder":
        (root / "images").rename(root / "pictures")
    elif how == "no labels folder":
        (root / "labels").rename(root / "masks")
    elif how == "empty split":
        image.unlink()
        (root / "images/train/sub/b.png").unlink()
    elif how == "image without label":
        label.unlink()
    elif how == "label without image":
        image.unlink()
    elif how == "same stem twice":
        write(root / "images/train/a.jpg", photo())
    elif how == "same output name":
        write(root / "images/train/sub__b.png", photo())
        write(root / "labels/train/sub__b.png", ids(0, 1))
    elif how == "other size":
        write(image, photo(size=(6, 10)))
    elif how == "truncated image":
        image.write_bytes(image.read_bytes()[:200])
    elif how == "truncated label":
        label.write_bytes(label.read_bytes()[:-30])
    elif how == "empty file":
        image.write_bytes(b"")
    elif how == "not a picture":
        image.write_text("Not found")
    elif how == "16-bit image":
        write(image, np.full(SIZE, 3000, np.uint16))


@pytest.mark.parametrize(
    ("how", "needles"),
    [
        ("no classes.txt", ["classes.txt", "one class name per line", "(ids found in the first labels: 0, 1, 2)"]),
        ("one class", ["classes.txt", "1 class:"]),
        ("empty line", ["classes.txt, line 2 is empty"]),
        ("flat images beside test", ["no folders train and val"]),
        ("class twice", ["classes.txt", "'ground' twice"]),
        ("bad colour", ["classes.txt", "'ground 0 0 256'"]),
        ("binary classes.txt", ["classes.txt", "UTF-8"]),
        ("no images folder", ["images", "does not exist"]),
        ("no labels folder", ["labels/train", "does not exist"]),
        ("empty split", ["images/train", "holds no images"]),
        ("image without label", ["images/train/a.png", "labels/train/a.png is missing"]),
        ("label without image", ["labels/train/a.png", "has no image"]),
        ("same stem twice", ["images/train/a.jpg", "images/train/a.png"]),
        ("same output name", ["images/train/sub__b.png", "images/train/sub/b.png"]),
    ],
)
def test_opening_tells_what_is_missing(folder: Path, how: str, needles: list[str]) -> None:
    """Everything that can be seen without decoding is told when the data set is opened, before any training."""
    damage(folder, how)
    sentence(lambda: open_dataset("folder", folder, "train"), *needles)


@pytest.mark.parametrize(
    ("how", "needles"),
    [
        ("other size", ["images/train/a.png", "10×6", "20×12"]),
        ("truncated image", ["images/train/a.png", "cannot be read"]),
        ("truncated label", ["labels/train/a.png", "cannot be read"]),
        ("empty file", ["images/train/a.png", "cannot be read"]),
        ("not a picture", ["images/train/a.png", "cannot be read"]),
        ("16-bit image", ["images/train/a.png", "8 bits"]),
    ],
)
def test_loading_and_checking_tell_what_is_broken(folder: Path, how: str, needles: list[str]) -> None:
    """What only decoding shows is told by `check`, and by loading the one pair, with the same sentence."""
    damage(folder, how)
    train = open_dataset("folder", folder, "train")
    sentence(lambda: train.pair(0), *needles)
    sentence(train.check, *needles)
    train.pair(1)


def test_check_counts_further_problems(folder: Path) -> None:
    """One sentence however many files are broken: the first, and the number of others."""
    for key in ("a", "sub/b"):
        write(folder / f"labels/train/{key}.png", 9)
    sentence(open_dataset("folder", folder, "train").check, "a.png", "(and 1 more file with a problem)")


def test_check_refuses_labels_of_a_single_class(folder: Path) -> None:
    """A mask of 0 and 255 (ignored) has nothing to learn and would score 1.0: its author meant 0 and 1. To score, one
    class is enough, none is not."""
    for name in ("a", "sub/b"):
        write(folder / f"labels/train/{name}.png", ids(0, 255))
    write(folder / "labels/val/c.png", ids(0, 255))
    train, val = (open_dataset("folder", folder, split) for split in ("train", "val"))
    sentence(train.check, "only the class 'ground'", "50 %", "nothing to learn", "a mask of 0 and 255")
    assert val.check()[[0, 255]].tolist() == [val.label(0).size // 2] * 2
    write(folder / "labels/val/c.png", ids(255, 255))
    sentence(val.check, "no class at all", "nothing to score")


def test_pictures_are_upright(tmp_path: Path) -> None:
    """A phone's JPEG lies on its side and says so in its EXIF data; annotation tools show it upright."""
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6).repeat(8, 0).repeat(8, 1))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "phone.jpg", exif=exif, quality=100)
    assert read_image(tmp_path / "phone.jpg").shape == (48, 32, 3)


def test_links_that_lead_upwards_end(tmp_path: Path) -> None:
    """A link to the folder itself adds no image twice."""
    (tmp_path / "a.png").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(find_files(tmp_path, (".png",))) == ["a"]


@pytest.mark.parametrize("name", DATASETS)
def test_wrong_roots_and_splits(name: str, tmp_path: Path) -> None:
    """No root, a root that is not there, an empty one, a file, and a split of another name: a sentence each."""
    if name == "demo":
        sentence(lambda: open_dataset(name, tmp_path, "train"), "`root`")
        sentence(lambda: open_dataset(name, None, "test"), "'test'", "train, val")
        return
    (tmp_path / "file").touch()
    sentence(lambda: open_dataset(name, tmp_path / "gone", "train"), str(tmp_path / "gone"), "does not exist")
    sentence(lambda: open_dataset(name, tmp_path / "file", "train"), "is not a folder")
    sentence(lambda: open_dataset(name, tmp_path, "train"), str(tmp_path), "does not exist")
    sentence(lambda: open_dataset(name, tmp_path, "trian"), "'trian'", ", ".join(DATASETS[name].splits))
    if name != "cityscapes":
        sentence(lambda: open_dataset(name, None, "train"), "`root=DIR`")


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_speaks_for_itself(name: str) -> None:
    """Protects those who add a data set: what the trainer and the commands ask for, each entry of DATASETS says."""
    dataset = DATASETS[name]
    assert dataset.name == name
    assert dataset.recipe.batch_size >= 2
    assert {"train", "val"} <= set(dataset.splits) <= {"train", "val", "test"}
    if dataset.submission is not None:
        assert dataset.submission.ids.shape == (256,)
        assert dataset.submission.ids.dtype == np.uint8


def test_unknown_dataset() -> None:
    """The names to choose from are told."""
    sentence(lambda: open_dataset("ade20k", None, "train"), "'ade20k'", "demo, cityscapes, camvid, folder")


def test_empty_and_unmatched_splits(camvid: Path, cityscapes: Path) -> None:
    """The fixed layouts too: an empty split and an image without label name the folder and the file."""
    (camvid / "valannot/x_02.png").unlink()
    sentence(lambda: open_dataset("camvid", camvid, "val"), "val/x_02.jpg", "valannot/x_02.png is missing")
    (cityscapes / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    sentence(
        lambda: open_dataset("cityscapes", cityscapes, "train"),
        "ulm_000001_000019_leftImg8bit.png has no label",
        "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png is missing",
    )
    next(cityscapes.glob("leftImg8bit/val/*/*")).unlink()
    sentence(lambda: open_dataset("cityscapes", cityscapes, "val"), "leftImg8bit/val", "holds no")


def test_hidden_files_and_upper_case_endings(folder: Path) -> None:
    """Files that systems leave behind are no images; .PNG is."""
    (folder / "images/train/._a.png").write_bytes(b"\0")
    write(folder / "images/train/.ipynb_checkpoints/a-checkpoint.png", photo())
    (folder / "images/train/Thumbs.db").write_bytes(b"\0")
    (folder / "images/train/a.png").rename(folder / "images/train/a.PNG")
    assert len(open_dataset("folder", folder, "train")) == 2


def test_linked_folders_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data often lies on another disk, with links to it."""
    disk = tmp_path_factory.mktemp("disk") / "train"
    (folder / "images/train/sub").rename(disk)
    (folder / "images/train/sub").symlink_to(disk, target_is_directory=True)
    assert len(open_dataset("folder", folder, "train")) == 2


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_keeps_the_interface(name: str, request: pytest.FixtureRequest) -> None:
    """Classes, palette, protocol, names, shapes and dtypes are of one form, whatever the data."""
    root = None if name == "demo" else request.getfixturevalue(name)
    dataset: SegmentationDataset = open_dataset(name, root, "train")
    assert (dataset.name, dataset.split, dataset.has_labels) == (name, "train", True)
    assert dataset.palette.shape == (len(dataset.classes), 3)
    assert dataset.palette.dtype == np.uint8
    assert "\n" not in dataset.protocol
    assert str(len(dataset)) in dataset.protocol
    stems = [dataset.stem(i) for i in range(len(dataset))]
    assert len(set(stems)) == len(dataset)
    assert all(re.fullmatch(r"[\w-]+", stem) for stem in stems)
    image, label = dataset.pair(0)
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (*label.shape, 3)
    assert set(np.unique(label)) <= {*range(len(dataset.classes)), 255}


def test_a_damaged_exif_is_passed_over(tmp_path: Path) -> None:
    """Protects pictures that viewers show: what is damaged is the note that they are turned, not the pixels."""
    pixels = np.full((8, 12, 3), 100, np.uint8)
    for number, exif in enumerate((b"garbage", b"Exif\0\0MM\0*\0\0")):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path, exif=exif)
        assert read_image(path).shape == (8, 12, 3)


# Ids exactly as a file holds them


def png_cases() -> list[tuple[str, int]]:
    return [(kind, depth) for kind, (_, _, depths) in COLOUR_TYPES.items() for depth in depths]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "depth"), png_cases())
def test_every_kind_of_png(tmp_path: Path, kind: str, depth: int, interlaced: bool) -> None:
    """Protects ids from what a decoder makes of a PNG: of each colour type and depth, interlaced or not, a label gives
    its samples or a sentence, and an image the colours that viewers show, or a sentence where 8 bits are too few."""
    channels = COLOUR_TYPES[kind][1]
    highest = 300 if depth == 16 else min(2**depth, 200)
    samples = np.random.default_rng(depth).integers(0, highest, (11, 13, channels))
    palette = np.random.default_rng(1).integers(0, 256, (2**depth, 3)) if kind == "palette" else None
    for transparent in (None, {"grey": b"\0\1", "RGB": b"\0\1\0\2\0\3", "palette": b"\0\x80"}.get(kind)):
        content = png(samples, kind, depth, palette=palette, transparent=transparent, interlaced=interlaced)
        path = tmp_path / "x.png"
        path.write_bytes(content)
        if channels == 1:
            label = read_label(path)
            assert np.array_equal(label.ids, samples[..., 0])
            assert (label.palette is None) == (palette is None)
        else:
            sentence(lambda path=path: read_label(path), str(path), "one channel")
        if depth == 16:
            sentence(lambda path=path: read_image(path), str(path), "8 bits per channel")
            continue
        colours = samples[..., :3] if channels > 2 else samples[..., :1].repeat(3, 2) * (255 // (2**depth - 1))
        if palette is not None:
            colours = palette[samples[..., 0]]
        assert np.array_equal(read_image(path), colours)


def test_ids_of_few_bits_are_no_greys(folder: Path) -> None:
    """Id 15 of 4 bits is 15, not the 255 that viewers show, which would be ignored without a word."""
    (folder / "classes.txt").write_text("\n".join(f"class {i}" for i in range(16)))
    samples = ids(0, 1, 14, 15)
    (folder / "labels/val/c.png").write_bytes(png(samples[..., None], "grey", 4))
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), samples)


def test_labels_of_few_bits_among_others(folder: Path) -> None:
    """An optimiser that meets only 0 and 255 in a label writes one bit: white is 1 then, or 255. Where the other labels
    have 8 bits, that is asked, but not of a label that is all 0, nor where all have one bit."""
    path = folder / "labels/train/a.png"
    path.write_bytes(png(ids(0, 1)[..., None], "grey", 1))
    sentence(lambda: open_dataset("folder", folder, "train"), str(path), "1 bit", "sub/b.png", "8 bits")
    path.write_bytes(png(ids(0, 0)[..., None], "grey", 1))
    open_dataset("folder", folder, "train")
    for name in ("a", "sub/b"):
        (folder / f"labels/train/{name}.png").write_bytes(png(ids(0, 1)[..., None], "grey", 1))
    assert np.array_equal(open_dataset("folder", folder, "train").label(0), ids(0, 1))


def test_a_label_is_lossless_inside(folder: Path) -> None:
    """JPEG paints ids that nobody painted, whatever the file is called; so may a TIFF that holds one."""
    label = Image.fromarray(ids(0, 1, 2))
    for name, form, options in (
        ("c.png", "JPEG", {}),
        ("c.png", "GIF", {}),
        ("c.tif", "TIFF", {"compression": "jpeg"}),
    ):
        (folder / "labels/val/c.png").unlink(missing_ok=True)
        path = folder / "labels/val" / name
        label.save(path, form, **options)
        val = open_dataset("folder", folder, "val")
        sentence(lambda val=val: val.label(0), str(path), "jpeg" if form == "TIFF" else f"a {form} file inside", "PNG")
        path.unlink()


@pytest.mark.parametrize("name", ["c.bmp", "c.BMP", "c.tif", "c.tiff", "lzw", "deflate", "palette.bmp", "palette.tif"])
def test_labels_in_other_lossless_formats(folder: Path, name: str) -> None:
    """GIS tools write TIFF, older ones BMP: the same ids."""
    wanted = ids(0, 1, 2, 255)
    picture, options = Image.fromarray(wanted), {}
    if name in ("lzw", "deflate"):
        options = {"compression": {"lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate"}[name]}
    if name.startswith("palette"):
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    (folder / "labels/val/c.png").unlink()
    picture.save(
        folder / "labels/val" / (name if name.startswith("c.") else f"c.{name.partition('.')[2] or 'tif'}"), **options
    )
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), wanted)


def test_bmps_that_pillow_misreads(tmp_path: Path) -> None:
    """Where the palette is black and white, or the greys from 0 on, Pillow takes each byte for 1 or 8 bits, whatever
    the file says: ids of 0 everywhere. Others are read as they are."""
    path, wanted = tmp_path / "x.bmp", ids(0, 1)
    write_palette(path, wanted, [(0, 0, 0), (255, 255, 255)])
    for read in (read_image, read_label):
        sentence(lambda read=read: read(path), str(path), "BMP of 8 bits", "save it as PNG")
    write_palette(path, wanted, [(255, 255, 255), (0, 0, 0)])
    assert np.array_equal(read_label(path).ids, wanted)
    Image.fromarray(wanted > 0).save(path)
    assert np.array_equal(read_label(path).ids, wanted)


def test_tiffs_of_few_bits(tmp_path: Path) -> None:
    """As in PNGs, ids of 2 and 4 bits are not the greys that viewers show."""
    path = tmp_path / "x.tif"
    for bits in (1, 2, 4):
        samples = np.arange(8).reshape(1, 8) % 2**bits
        packed = np.packbits(((samples.reshape(-1, 1) >> np.arange(bits)[::-1]) & 1).astype(np.uint8)).tobytes()
        tags = {256: 8, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        start = 8 + len(packed)
        directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
        path.write_bytes(struct.pack("<2sHI", b"II", 42, start) + packed + directory)
        assert np.array_equal(read_label(path).ids, samples)


def test_tiffs_of_other_meaning(tmp_path: Path) -> None:
    """Values below 0 stay so (-1 is not 255), and several pages, fractions and inverted greys are refused."""
    label = ids(0, 1, 2)
    path = tmp_path / "x.tif"
    Image.fromarray(label.astype(np.int32) - 1).save(path)
    assert np.array_equal(read_label(path).ids, label.astype(np.int32) - 1)
    signed = TiffImagePlugin.ImageFileDirectory_v2()
    signed[339] = 2
    Image.fromarray((label.astype(np.int8) - 1).view(np.uint8)).save(path, tiffinfo=signed)
    assert np.array_equal(read_label(path).ids, label.astype(np.int8) - 1)
    Image.fromarray(label.astype(np.float32)).save(path)
    sentence(lambda: read_label(path), "fractions")
    Image.fromarray(label).save(path, save_all=True, append_images=[Image.fromarray(label)])
    sentence(lambda: read_label(path), "2 pictures")
    inverted = TiffImagePlugin.ImageFileDirectory_v2()
    inverted[262] = 0
    Image.fromarray(label).save(path, tiffinfo=inverted)
    sentence(lambda: read_label(path), "white is 0")


def test_an_animated_label_is_refused(tmp_path: Path) -> None:
    """Of an animated PNG one picture would be read and the others passed over; as an image its first is read."""
    frames = [Image.fromarray(ids(i, 1)) for i in range(3)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    sentence(lambda: read_label(tmp_path / "x.png"), "holds 3 pictures")
    assert np.array_equal(read_image(tmp_path / "x.png")[..., 0], ids(0, 1))


def test_damaged_pngs_do_not_change_ids(tmp_path: Path) -> None:
    """One flipped bit of the compressed ids may give other ids without an error: PNG's checksums tell."""
    path = write(tmp_path / "x.png", (np.arange(64 * 64).reshape(64, 64) // 100 % 19).astype(np.uint8))
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    for place in range(start, content.index(b"IEND") - 4):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        sentence(lambda: read_label(path), str(path), "cannot be read")


# What palettes say


def write_palette(path: Path, pixels: np.ndarray, colours: list[tuple[int, int, int]]) -> Path:
    picture = Image.fromarray(pixels)
    picture.putpalette([value for colour in colours for value in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def test_palettes_of_greys(folder: Path) -> None:
    """PNG optimisers turn the greys in use into a palette, whose indices are not the ids: refused where both differ,
    unless classes.txt gives those colours. Greys that are their indices, and what is not in use, do not matter."""
    path = folder / "labels/val/c.png"
    greys = [(i, i, i) for i in range(256)]
    write_palette(path, ids(0, 1, 2, 255), greys)
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 1, 2, 255))
    write_palette(path, ids(0, 1), [(0, 0, 0), (1, 1, 1), (9, 9, 9)])
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 1))
    write_palette(path, ids(0, 1, 2), [(0, 0, 0), (1, 1, 1), (9, 9, 9)])
    val = open_dataset("folder", folder, "val")
    sentence(lambda: val.label(0), str(path), "index 2 in the colour 9 9 9", "indices or the greys", "classes.txt")
    (folder / "classes.txt").write_text("ground 0 0 0\nwall 1 1 1\nsky 9 9 9\n")
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 1, 2))


@pytest.mark.parametrize("last", [2, 255])
def test_palettes_that_are_too_short(folder: Path, last: int) -> None:
    """Indices that the palette does not have would be compared with nothing."""
    samples = ids(0, 1, last)
    palette = np.array([[0, 0, 0], [200, 0, 0]])
    (folder / "labels/val/c.png").write_bytes(png(samples[..., None], "palette", 8, palette=palette))
    val = open_dataset("folder", folder, "val")
    sentence(lambda: val.label(0), "c.png", f"uses the index {last}", "ends at 1")


def test_palettes_are_compared_with_the_colours_of_classes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A palette in another order would permute the classes; colours that no class has say nothing; the built-in colours
    of CamVid count as classes.txt's do."""
    (folder / "classes.txt").write_text("ground 0 0 0\nwall 255 0 0\nsky 0 255 0\n")
    path = folder / "labels/val/c.png"
    own = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    write_palette(path, ids(0, 1, 2), own)
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 1, 2))
    write_palette(path, ids(0, 1, 2), [(7, 0, 0), (0, 7, 0), (0, 0, 7)])
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 1, 2))
    write_palette(path, ids(0, 2), [own[0], own[2], own[2]])  # index 1 is wrong, and not in use
    assert np.array_equal(open_dataset("folder", folder, "val").label(0), ids(0, 2))
    write_palette(path, ids(0, 1, 2), [own[0], own[2], own[1]])
    val = open_dataset("folder", folder, "val")
    sentence(lambda: val.label(0), str(path), "index 1 in the colour 0 255 0", "'sky', not of 'wall'")
    camvid = tmp_path_factory.mktemp("camvid")
    write(camvid / "val/x.png", photo())
    write_palette(camvid / "valannot/x.png", ids(0, 1), [(128, 0, 0), (128, 128, 128)])
    data = open_dataset("camvid", camvid, "val")
    sentence(lambda: data.label(0), "index 0 in the colour 128 0 0", "'building', not of 'sky'")


def test_palettes_are_compared_among_files(folder: Path) -> None:
    """A palette made for each picture gives a class another index in each: seen when the folder is opened, also if the
    other label is of another split. Palettes that end with the last index in use do not differ."""
    colours = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]
    a, b, c = (folder / f"labels/{key}.png" for key in ("train/a", "train/sub/b", "val/c"))
    write_palette(a, ids(0, 1, 2), colours)
    write_palette(b, ids(0, 1), colours[:2])
    write_palette(c, ids(0, 1), [colours[0], colours[2]])
    for split in ("train", "val"):
        sentence(
            lambda split=split: open_dataset("folder", folder, split), "a.png", "c.png", "the id 1", "different colours"
        )
    write_palette(c, ids(1, 1), [colours[1], colours[0]])
    sentence(lambda: open_dataset("folder", folder, "train"), "the id 1 in different colours")
    write_palette(b, ids(0, 0), [colours[0], (9, 9, 0)])
    write_palette(a, ids(1, 1), [(9, 9, 9), colours[0]])
    c.unlink()
    sentence(lambda: open_dataset("folder", folder, "train"), "different ids, 1 and 0, in the same colour 0 0 0")
    write_palette(a, ids(0, 1, 2), colours)
    assert len(open_dataset("folder", folder, "train")) == 2  # the odd colour of b.png is not in use


# What is ignored, and masks of two classes


def test_ignore_label(folder: Path) -> None:
    """Void may be any id, also of 16 bits, or one that classes.txt names, which is then no class; 255 stays ignored."""
    path = folder / "labels/val/c.png"
    for void in (3, 200, 65535):
        label = ids(0, 2, 3, 255).astype(np.uint16)
        label[label == 3] = void
        write(path, label)
        sentence(open_dataset("folder", folder, "val").check, str(path), f"`ignore_label={void}`")
        val = open_dataset("folder", folder, "val", ignore_label=void)
        assert np.array_equal(val.label(0), ids(0, 2, 255, 255))
        assert f"{min(void, 255)} and {max(void, 255)} ignored" in val.protocol
        assert val.ids.tolist() == [0, 1, 2]
    write(path, ids(0, 1, 2, 255))
    val = open_dataset("folder", folder, "val", ignore_label=1)
    assert val.classes == ("ground", "sky")
    assert np.array_equal(val.label(0), ids(0, 255, 1, 255))
    assert val.ids.tolist() == [0, 2]
    (folder / "classes.txt").write_text("ground\nwall\n")
    sentence(lambda: open_dataset("folder", folder, "val", ignore_label=1), "`ignore_label=1`", "one of the two")
    sentence(lambda: open_dataset("demo", None, "val", ignore_label=1), "demo takes no `ignore_label`")


def test_binary_masks(folder: Path) -> None:
    """With two classes, masks of 0 and 255 are asked about, also when scoring, and the options in that sentence read
    them; masks of one bit, and of 0 and 1, need none."""
    (folder / "classes.txt").write_text("ground\nwall\n")
    keys = ("train/a", "train/sub/b", "val/c")
    for key in keys:
        write(folder / f"labels/{key}.png", ids(0, 255))
    for split in ("train", "val"):
        sentence(
            lambda split=split: open_dataset("folder", folder, split),
            "only 0 and 255",
            "`binary_masks=True`",
            "`ignore_label=255`",
        )
    assert np.array_equal(open_dataset("folder", folder, "val", ignore_label=255).label(0), ids(0, 255))
    train = open_dataset("folder", folder, "train", binary_masks=True)
    train.check()
    assert np.array_equal(train.label(0), ids(0, 1))
    assert train.ids.tolist() == [0, 255]
    assert "nothing ignored" in train.protocol
    for options in ({"reduce_zero_label": True}, {"ignore_label": 255}):
        sentence(
            lambda options=options: open_dataset("folder", folder, "val", binary_masks=True, **options),
            "`binary_masks`",
        )
    for content in (
        png(ids(0, 1)[..., None], "grey", 1),
        png(ids(0, 1)[..., None], "palette", 1, palette=np.array([[0], [255]]).repeat(3, 1)),
    ):
        for key in keys:
            (folder / f"labels/{key}.png").write_bytes(content)
        for binary in (False, True):
            assert np.array_equal(open_dataset("folder", folder, "val", binary_masks=binary).label(0), ids(0, 1))
    (folder / "labels/val/c.png").write_bytes(
        png(ids(0, 1)[..., None], "palette", 1, palette=np.array([[255], [0]]).repeat(3, 1))
    )
    (folder / "labels/train/a.png").unlink()
    (folder / "labels/train/sub/b.png").unlink()
    val = open_dataset("folder", folder, "val")
    sentence(lambda: val.label(0), "index 0 in the colour 255 255 255")
    write(folder / "labels/val/c.png", ids(0, 128, 255))
    val = open_dataset("folder", folder, "val", binary_masks=True)
    sentence(lambda: val.label(0), "128 (80 px)")


# classes.txt as others write it


@pytest.mark.parametrize(
    "text",
    [
        "road\ntraffic light\n",
        "0 road\n1 traffic light\n",
        "0: road\n1: traffic light",
        "0,road\n1,traffic light",
        "0. road\n1. traffic light",
        "0 - road\n1 - traffic light",
        "00_road\n01_traffic light",
        "road 0\ntraffic light 1",
        "road = 0\ntraffic light = 1",
        "road 128 64 128\ntraffic light 250 170 30",
        "road,128,64,128\ntraffic light,250,170,30",
        "road\t128\t64\t128\ntraffic light\t250\t170\t30",
        "road;(128, 64, 128)\ntraffic light;(250, 170, 30)",
        "0 road 128 64 128\n1 traffic light 250 170 30",
        "road 0 128 64 128\ntraffic light 1 250 170 30",
        "road #804080\ntraffic light #FAAA1E",
        "# two classes\nroad\ntraffic light # red or not",
        'name,r,g,b\nroad,128,64,128\n"traffic light",250,170,30',
        "Name R G B\nroad 128 64 128\ntraffic light 250 170 30",
        "Pixel Value, Class\n0, road\n1, traffic light",
        "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:250,170,30::",
    ],
)
def test_classes_txt_of_others(tmp_path: Path, text: str) -> None:
    """Ids that are those of the lines, colours, comments and headings do not become parts of names, or classes."""
    (tmp_path / "classes.txt").write_text(text)
    names, colours = read_classes(tmp_path / "classes.txt", 0)
    assert names == ("road", "traffic light")
    assert colours in ({}, {0: (128, 64, 128), 1: (250, 170, 30)})
    assert bool(colours) == ("128" in text or "#8" in text)


@pytest.mark.parametrize("names", ["zone 1\nzone 2", "route 66\nroad", "3d printer\nroad", "door, double\nroad", "a\nb",
                                   "class a\nclass b", "red\ngreen", "Straße\nДорога"])  # fmt: skip
def test_names_with_numbers_and_commas(tmp_path: Path, names: str) -> None:
    """What looks like an id, a column or a heading, and is a part of a name."""
    (tmp_path / "classes.txt").write_text(names, encoding="utf-8")
    assert read_classes(tmp_path / "classes.txt", 0)[0] == tuple(names.split("\n"))


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("1 road\n2 car", ["line 1 is '1 road'", "'0 road'", "`reduce_zero_label=True`"]),
        ("7: road\n8: car", ["line 1 is '7: road'", "'0 road'"]),
        ("0 road\n2 car 1 2 3", ["line 2", "'1 car 1 2 3'"]),
        ("-1 void\n0 road\n1 car", ["line 1", "take the line out"]),
        ("1-road\n2-car", ["'0 road'"]),
        ("1 road\n2 car\n3 road", ["line 1", "'0 road'"]),
        ("road 7\ncar 8", ["line 1", "'0 road'"]),
        ("1\n2", ["line 1"]),
        ("road\n2 wheeler\ncar", ["line 2 is '2 wheeler'", "in all lines or in none"]),
        ("names:\nroad\ncar", ["line 1 is 'names:'", "'# names:'"]),
        ("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.2\tsky", ["line 1", "heading"]),
        ("label:color:parts\nroad:1,2,3\ncar:3,4,5", ["line 1", "heading"]),
        ("128 0 0 road\n0 0 9 car", ["'road 128 0 0'"]),
        ("1 255 0 0 255 road\n2 0 0 9 255 car", ["'road 255 0 0'"]),
        ("#804080 road\n#000000 car", ["'road #804080'"]),
        ("128 64 128\n0 0 0", ["numbers without a name"]),
        ("road 0.5 0.2 0.1\ncar", ["0 to 255", "'road 128 64 128'"]),
        ('{"0": "road",\n"1": "car"}', ["line 1", "JSON"]),
        ("- road\n- car", ["line 1"]),
        ("__ignore__\n_background_\ncar", ["line 1", "255"]),
        (f"road 1 2 {'9' * 5000}\ncar", ["0 to 255"]),
        (f"0 road\n{'9' * 5000} car", ["'1 car'"]),
        (f"0x{'f' * 5000} road\n0x1 car", ["'0 road'"]),
        ("a 1 2 3 1\nb 4 5 6 2", ["'0 a 1 2 3'"]),
        ("a 1 2 3 1\nb 4 5 6 0", ["'0 a 1 2 3'"]),
        ("a 0 64 128 255\nb 1 8 7 255", ["'0 a 64 128 255' or '0 a 0 64 128'"]),
        ("a 0 64 128 0\nb 1 8 7 1", ["'0 a 64 128 0' or '0 a 0 64 128'"]),
        ("a 9 64 128 255\nb 1 8 7", ["'a 9 64 128'", "'0 a 9 64 128 255'"]),
        ("road 7 128 64 128\ncar 26 0 0 142", ["'0 road 128 64 128'"]),
        ("0 a\n1 b\n255: void", ["line 3", "take the line out"]),
        ("0 a\n1 b\n-1 void", ["line 3", "take the line out"]),
        ("a => 1\nb => 2", ["'0 a'"]),
        ("1 => a\n2 => b", ["'0 a'"]),
        ("a -> 1\nb -> 2", ["'0 a'"]),
        ("0-10 a\n11-20 b", ["line 1", "not a range"]),
        ("0 - 10 a\n11 - 20 b", ["line 1", "not a range"]),
        ("01 a\n02 b", ["'0 a'", "`reduce_zero_label=True`"]),
        ("01_a\n02_b", ["'0 a'", "`reduce_zero_label=True`"]),
        ("#1 a\n#2 b", ["all its lines begin with #"]),
        ("name,b,g,r\na,1,2,3\nb,4,5,6", ["line 1", "red, green, blue"]),
        ("class bgr\na 1 2 3\nb 4 5 6", ["line 1", "red, green, blue"]),
        ("zone 1 north\nzone 2 south", ["'0 zone north'", "'0 zone 1 north'"]),
        ("a 7 thing\nb 8 thing\nc 9 thing", ["'0 a thing'"]),
        (f"road\ncar {'9' * 5000} 2 3", ["0 to 255"]),
    ],
)
def test_classes_txt_that_would_shift_names(tmp_path: Path, text: str, needles: list[str]) -> None:
    """Every class would get its neighbour's name: the line, and what would be right there. No number is too long."""
    (tmp_path / "classes.txt").write_text(text)
    sentence(lambda: read_classes(tmp_path / "classes.txt", 0), "classes.txt", *needles)
    with pytest.raises(UserError) as caught:
        read_classes(tmp_path / "classes.txt", 0)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "form",
    ["({}) {}", "{1} ({0})", "{1} [{0}]", "{1}({0})", "[{}] {}", '"{}","{}"', "'{}': '{}',", "{}/{}", "{1}/{0}",
     "0x{} {}", "No.{} {}", "No. {}: {}", "class {}: {}", "id {} {}", "{}：{}", "{}、{}", "\uff10\uff10{} {}",
     "{} => {}", "{} -> {}", "{1} => {0}", "{1} (id {0})", "{1} No. {0}", "{1}: id={0}", "id={} {}",
     "{1} - {0}", "{}){}", "0{} {}", "0{}_{}", "{}\x85{}"],
)  # fmt: skip
def test_every_form_of_an_id(tmp_path: Path, form: str) -> None:
    """Ids that are those of the lines are left out, and others refused with the line that would be right."""
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(form.format(i, name) for i, name in enumerate(("road", "car", "sky"))), encoding="utf-8")
    assert read_classes(path, 0) == (("road", "car", "sky"), {})
    path.write_text("\n".join(form.format(i, name) for i, name in enumerate(("road", "car"), 1)), encoding="utf-8")
    sentence(lambda: read_classes(path, 0), "line 1", "'0 road'", "`reduce_zero_label=True`")
    assert read_classes(path, 1) == (("road", "car"), {})


@pytest.mark.parametrize("form", ["{1},{0},thing", "{1} {0} thing", "{1}_{0}", "{1}{0}", "class_{}_{}", "{}#{}"])
def test_numbers_that_count_lines(tmp_path: Path, form: str) -> None:
    """A number at any place that counts the lines otherwise than we do is an id, unless the names are the same but for
    it; an id before them all says what is meant."""
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(form.format(i, name) for i, name in enumerate(("road", "car", "sky"), 1)))
    sentence(lambda: read_classes(path, 0), "line 1", "write '0 ", "belongs to the name")
    lines = [f"{i} {line}" for i, line in enumerate(path.read_text().split("\n"))]
    path.write_text("\n".join(lines))
    assert read_classes(path, 0)[0][0] == lines[0][2:]
    path.write_text("\n".join(form.format(i, "road") for i in range(1, 4)))
    if not form.startswith("{}"):
        assert len(read_classes(path, 0)[0]) == 3


@pytest.mark.parametrize(
    ("text", "colours"),
    [
        ("a 0 64 128 255\nb 9 8 7 255", [(0, 64, 128), (9, 8, 7)]),
        ("a (0, 64, 128, 255)\nb (9, 8, 7, 255)", [(0, 64, 128), (9, 8, 7)]),
        ("0 a 0 64 128 255\n1 b 9 8 7 255", [(0, 64, 128), (9, 8, 7)]),
        ("a 0 0 64 128 255\nb 1 9 8 7 255", [(0, 64, 128), (9, 8, 7)]),
        ("a 0 64 128 0\nb 9 8 7 1", [(0, 64, 128), (9, 8, 7)]),
        ("a 0 0 64 128\nb 1 9 8 7", [(0, 64, 128), (9, 8, 7)]),
    ],
)
def test_four_numbers_behind_names(tmp_path: Path, text: str, colours: list[tuple[int, ...]]) -> None:
    """An opacity, or an id before or behind the colour, does not shift its values."""
    (tmp_path / "classes.txt").write_text(text)
    assert read_classes(tmp_path / "classes.txt", 0) == (("a", "b"), dict(enumerate(colours)))


def test_lines_end_where_editors_end_them(tmp_path: Path) -> None:
    """A form feed or a separator of Unicode would shift every class behind it."""
    path = tmp_path / "classes.txt"
    path.write_bytes("a\x0bb\r\nc\x0cd\re\x85f\ng\u2028h\n".encode())
    assert read_classes(path, 0)[0] == ("a b", "c d", "e f", "g h")
    path.write_text("zone 1 10 20 30\nzone 2 40 50 60\nroute 300 1 2 3\nroute 66 4 5 6")
    assert read_classes(path, 0)[0] == ("zone 1", "zone 2", "route 300", "route 66")


def test_classes_txt_from_1_on(folder: Path) -> None:
    """With reduce_zero_label the first line is that of id 1, with its number or without."""
    (folder / "classes.txt").write_text("1 ground\n2 wall\n3 sky\n")
    assert open_dataset("folder", folder, "val", reduce_zero_label=True).classes == ("ground", "wall", "sky")
    (folder / "classes.txt").write_text("0 ground\n1 wall\n2 sky\n")
    sentence(lambda: open_dataset("folder", folder, "val", reduce_zero_label=True), "line 1", "'1 ground'")


# Splits of other names


def rename_splits(root: Path, images: tuple[str, str], labels: tuple[str, str]) -> None:
    for kind, names in (("images", images), ("labels", labels)):
        for old, new in zip(("train", "val"), names, strict=True):
            (root / kind / old).rename(root / kind / "moving")
            (root / kind / new).parent.mkdir(parents=True, exist_ok=True)
            (root / kind / "moving").rename(root / kind / new)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (("Train", "Val"), ("Train", "Val")),
        (("training", "validation"), ("training", "validation")),
        (("train2017", "val2017"), ("train2017", "val2017")),
        (("train", "valid"), ("train", "val")),
        (("train_images", "val_images"), ("train_segmentations", "val_segmentations")),
        (("TRAIN", "VALID"), ("train", "valid")),
        (("TrainingSet", "ValidationSet"), ("TrainDataset", "ValDataset")),
        (("trainset", "valset"), ("trainA", "valA")),
    ],
    ids=["capitals", "ADE20K, Mapillary", "COCO-Stuff", "Roboflow", "LIP", "mixed", "CamelCase", "one word"],
)
def test_splits_by_other_names(folder: Path, images: tuple[str, str], labels: tuple[str, str]) -> None:
    """The owner's val images are the val split, whatever their folder is called."""
    rename_splits(folder, images, labels)
    train, val = (open_dataset("folder", folder, split) for split in ("train", "val"))
    assert [train.stem(i) for i in range(2)] == ["a", "sub__b"]
    assert [val.stem(i) for i in range(len(val))] == ["c"]
    assert images[1] in val.protocol
    train.check()
    val.check()


@pytest.mark.parametrize(
    ("images", "needles"),
    [
        (("trainval", "dev"), ["no folders train and val", "dev, trainval"]),
        (("10k/train", "10k/val"), ["10k/train looks like a split"]),
        (("train", "train2"), ["images/val does not exist", "train, train2"]),
        (("train1", "train2"), ["several folders for the split train", "train1 and train2"]),
        (("train_station", "harbour"), ["images/val does not exist", "train_station"]),
    ],
    ids=["no meaning", "BDD100K", "no val", "two of a kind", "a place"],
)
def test_splits_that_cannot_be_followed(folder: Path, images: tuple[str, str], needles: list[str]) -> None:
    """Names that look like splits are never merged and split anew: val images would be trained on."""
    rename_splits(folder, images, images)
    sentence(lambda: [open_dataset("folder", folder, split) for split in ("train", "val")], *needles)


@pytest.mark.parametrize(
    "names",
    ["TrainDataset TestDataset", "trains vals", "trn vld", "imagesTr imagesTs", "Tr Ts", "DUTS-TR DUTS-TE",
     "DUTS-TR DUTS-TE ECSSD", "img_train img_val", "images_train images_val", "leftImg8bit_train leftImg8bit_val",
     "A_train A_val", "_train _val", "1_train 2_val", "my-train my-test", "my-train my-test harbour",
     "sets/foo_train sets/foo_val", "a/foo_train b/foo_val", "my_train my_dev", "imgtrainset imgvalset valset"],
)  # fmt: skip
def test_splits_side_by_side(tmp_path: Path, names: str) -> None:
    """One of these names may be a place, two that mean different splits are splits: they are not merged."""
    (tmp_path / "classes.txt").write_text("ground\nwall\n")
    for i, name in enumerate(names.split()):
        for kind in ("images", "labels"):
            write(tmp_path / kind / name / f"{i}.png", ids(0, 1) if kind == "labels" else photo())
    sentence(lambda: [open_dataset("folder", tmp_path, split) for split in ("train", "val")], "images")


@pytest.mark.parametrize(
    "names",
    ["my_test harbour", "trainstation valley", "contest value", "en tr te", "harbour/my_testing park", "trains cars",
     "Straße улица", "latest retrain"],
)  # fmt: skip
def test_places_that_are_no_splits(tmp_path: Path, names: str) -> None:
    """Words that only contain those of splits, or mean no second one, are folders like others."""
    (tmp_path / "classes.txt").write_text("ground\nwall\n")
    for i, name in enumerate(names.split()):
        for kind in ("images", "labels"):
            write(tmp_path / kind / name / f"{i}.png", ids(0, 1) if kind == "labels" else photo())
    lengths = [len(open_dataset("folder", tmp_path, split)) for split in ("train", "val")]
    assert sum(lengths) == len(names.split())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"frame_00(\d)", r"val_00\1"),
        (r"frame_01(\d)", r"trainimg\1"),
        (r"frame_0(\d\d)", r"ADE_train_\1"),
        (r"frame_0(\d\d)", r"frames_tr_\1"),
    ],
    ids=["one other", "one word", "a word behind", "abbreviated"],
)
def test_splits_in_file_names(flat: Path, old: str, new: str) -> None:
    """Different splits in the names of files are seen in other forms too, and beside an image without."""
    other = {"val": "train_", "tra": "valimg", "ADE": "ADE_val_", "fra": "frames_ts_"}[new[:3]]
    for kind in ("images", "labels"):
        for i, path in enumerate(sorted((flat / kind).iterdir())):
            name = re.sub(old, new, path.stem) if i % 2 else f"{other}{i}"
            if i == 19 and other != "frames_ts_":
                name = "another"
            path.rename(path.with_stem(name))
    sentence(lambda: open_dataset("folder", flat, "train"), "splits in their names")


@pytest.mark.parametrize(
    "name",
    ["train_list.txt", "splits.json", "split.csv", "splits/a.txt", "images/train.txt", "annotations/train.json",
     "ImageSets/a.txt", "lists/instances_val2017.json", "TrainFiles.lst"],
)  # fmt: skip
def test_lists_of_splits(flat: Path, name: str) -> None:
    """Lists in the data root and one level down say what is for training."""
    (flat / name).parent.mkdir(exist_ok=True)
    (flat / name).write_text("frame_001")
    sentence(lambda: open_dataset("folder", flat, "train"), name.split("/")[0], "one in five")


@pytest.mark.parametrize(
    "name",
    [
        "training_log.txt",
        "notes/a.txt",
        "frames.csv",
        "images/test_5.json",
        "labels/test_5_polygons.json",
        ".cache/train.txt",
        "test.png",
    ],
)
def test_files_that_are_no_lists(flat: Path, name: str) -> None:
    """Logs, annotations of an image, and hidden files may hold such words."""
    (flat / name).parent.mkdir(exist_ok=True)
    (flat / name).write_text("frame_001")
    for kind in ("images", "labels"):
        (flat / kind / "frame_005.png").rename(flat / kind / "test_5.png")
    assert len(open_dataset("folder", flat, "train")) == 16


def test_splits_by_file_names_and_lists(flat: Path) -> None:
    """So with images in one folder that have their splits in their names or in lists, as in PASCAL VOC."""
    for name in ("val.txt", "ImageSets"):
        (flat / name).mkdir() if name == "ImageSets" else (flat / name).write_text("frame_001\n")
        sentence(lambda: open_dataset("folder", flat, "train"), name, "one in five")
        (flat / name).rmdir() if name == "ImageSets" else (flat / name).unlink()
    open_dataset("folder", flat, "train")
    for kind in ("images", "labels"):
        for i in range(20):
            (flat / kind / f"frame_{i:03}.png").rename(flat / kind / f"ADE_{'val' if i < 4 else 'train'}_{i}.png")
    sentence(lambda: open_dataset("folder", flat, "train"), "splits in their names", "ADE_train_1", "ADE_val_")
    assert len(list((flat / "images").iterdir())) == 20


# EXIF, names and sizes


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["grey", "palette", "1 bit", "16 bits", "tif"])
def test_labels_are_turned_as_images_are(tmp_path: Path, orientation: int, kind: str) -> None:
    """A label with an orientation of its own is read as viewers show it, as the image is; kinds of all modes."""
    pixels = np.zeros((4, 6), np.uint8)
    pixels[0, :4] = 1
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = Image.fromarray({"1 bit": pixels > 0, "16 bits": pixels.astype(np.uint16)}.get(kind, pixels))
    if kind == "palette":
        picture.putpalette([9, 0, 0, 0, 9, 0])
    path = tmp_path / ("x.tif" if kind == "tif" else "x.png")
    picture.save(path, exif=exif)
    Image.fromarray(pixels[..., None].repeat(3, 2) * 255).save(tmp_path / "i.png", exif=exif)
    assert np.array_equal(read_label(path).ids == 1, read_image(tmp_path / "i.png")[..., 0] == 255)
    assert read_label(path).ids.shape == ((6, 4) if orientation > 4 else (4, 6))


def test_a_size_that_an_orientation_explains(folder: Path) -> None:
    """The advice to resize would ruin a label that only lies on its side."""
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(photo()).save(folder / "images/val/c.png", exif=exif)
    sentence(lambda: open_dataset("folder", folder, "val").pair(0), "12×20", "20×12", "EXIF orientation of c.png")
    Image.fromarray(photo()).save(folder / "images/val/c.png")
    Image.fromarray(ids(0, 1)).save(folder / "labels/val/c.png", exif=exif)
    sentence(lambda: open_dataset("folder", folder, "val").pair(0), "EXIF orientation")
    Image.fromarray(photo(size=(20, 12))).save(folder / "images/val/c.png")
    assert open_dataset("folder", folder, "val").pair(0)[1].shape == (20, 12)


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("c_mask.png", "c_mask.png lies there: `label_suffix='_mask'`"),
        ("c_my mask.tif", "`label_suffix='_my mask'`"),
        ("c.jpg", "c.jpg lies there, but labels are files that keep every id"),
        ("c.webp", "c.webp lies there"),
        ("sub/c.png", "sub/c.png lies there"),
        ("other.png", "holds other.png"),
        ("c2.png", "holds c2.png"),
    ],
)
def test_a_label_of_another_name(folder: Path, name: str, needle: str) -> None:
    """What lies where the label is missed, and the flag that reads such names."""
    (folder / "labels/val/c.png").unlink()
    write(folder / "labels/val" / name, ids(0, 1))
    sentence(lambda: open_dataset("folder", folder, "val"), "labels/val/c.png is missing", needle)


def test_label_suffix(folder: Path) -> None:
    """Labels with something behind the image's name, beside other files that are none."""
    for key in ("train/a", "train/sub/b", "val/c"):
        (folder / f"labels/{key}.png").rename(folder / f"labels/{key}_mask.png")
        write(folder / f"labels/{key}_colours.png", photo())
    train = open_dataset("folder", folder, "train", label_suffix="_mask")
    assert [train.stem(i) for i in range(len(train))] == ["a", "sub__b"]
    train.check()
    sentence(
        lambda: open_dataset("folder", folder, "val", label_suffix="_x"), "labels/val/c_x.png is missing", "c_mask"
    )


def test_names_of_other_systems(folder: Path) -> None:
    """An archive from macOS spells é as two characters, Windows does not tell upper case from lower: where one label
    can be meant, it is; where two can, none is guessed."""
    for i, (image, label) in enumerate((("caf\u00e9", "cafe\u0301"), ("IMG 1", "img 1"), ("Straße", "STRASSE"))):
        write(folder / f"images/val/{image}.png", photo())
        write(folder / f"labels/val/{label}.png", np.full(SIZE, i, np.uint8))
    val = open_dataset("folder", folder, "val")
    found = {val.stem(i): int(val.label(i)[0, 0]) for i in range(len(val))}
    assert found == {"IMG 1": 1, "Straße": 2, "c": 0, "caf\u00e9": 0}
    write(folder / "labels/val/Img 1.png", ids(0, 1))
    sentence(lambda: open_dataset("folder", folder, "val"), "IMG 1.png has no label")


def test_every_ending_of_a_jpeg_and_what_is_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo of a format that is not read is missed in the training, and the user told so."""
    for i, ending in enumerate(("jfif", "jpe", "JPEG")):
        Image.fromarray(photo()).save(folder / f"images/val/d{i}.{ending}", "JPEG")
        write(folder / f"labels/val/d{i}.png", ids(0, 1))
    assert len(open_dataset("folder", folder, "val")) == 4
    assert not capsys.readouterr().err
    for name in ("x.heic", "y.HEIC", "notes"):
        (folder / "images/val" / name).write_bytes(b"\0")
    open_dataset("folder", folder, "val").check()
    assert "3 files are passed over" in (said := capsys.readouterr().err)
    assert "2 .heic, 1 without ending" in said


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes a large scan for an attack: its size is told, and what to do; to replace the file is no advice."""
    path = write(tmp_path / "scan.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image, read_label):
        sentence(lambda read=read: read(path), str(path), "240 pixels", "cut it", "MAX_IMAGE_PIXELS")

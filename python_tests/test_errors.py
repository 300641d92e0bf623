"""What is said to people: flags in the place of arguments, plural forms, and one class for one fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bcmf_ext.checkpoint import load_checkpoint
from bcmf_ext.data.classes import read_classes
from bcmf_ext.data.pictures import read_image, read_label
from bcmf_ext.errors import Damaged, FileError, UserError, as_flags, command, counted, sentence_of
from bcmf_ext.files import read_text
from bcmf_ext.models.foreign import read_foreign


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("pass `binary_masks=True` if so.", "pass --binary-masks if so."),
        ("`compile=False` trains without it.", "--no-compile trains without it."),
        ("pass `ignore_label=255`, or leave `amp` out", "pass --ignore-label 255, or leave --amp out"),
        ("`label_suffix='-my mask'`", "--label-suffix='-my mask'"),
        (
            "`label_suffix='_mask'` and `pretrained='a run/best.pt'`",
            "--label-suffix _mask and --pretrained 'a run/best.pt'",
        ),
        ("say which: `resume=PATH`, `root=DIR`", "say which: --resume PATH, --data-root DIR"),
        ("`A.png` and `` stay, as does `a b`", "`A.png` and `` stay, as does `a b`"),
    ],
)
def test_flags_in_the_place_of_arguments(sentence: str, shown: str) -> None:
    """Protects users of the commands from names that they cannot type: each argument that a sentence of the library
    names becomes the flag, with its value as a shell takes it."""
    assert as_flags(sentence) == shown

    @command
    def main(argv: object) -> None:
        raise FileError(sentence)

    with pytest.raises(FileError) as raised:
        main()
    assert str(raised.value) == shown


def test_sentences_from_loading_processes() -> None:
    """Protects the one sentence: PyTorch puts the traceback of a loading process before it, whatever the class."""
    for kind in (UserError, FileError, Damaged):
        assert (
            sentence_of(kind(f"Caught {kind.__name__}\nTraceback …\nbcmf_ext.errors.{kind.__name__}: a: b.\n"))
            == "a: b."
        )
        assert sentence_of(kind("a: b.")) == "a: b."


def test_plural_forms() -> None:
    """Protects from "1 epochs"."""
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize("read", [load_checkpoint, read_foreign, read_image, read_label, read_text])
def test_a_file_that_is_not_there(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Protects callers: every reader says the same class of error for a file that is not there, a `UserError` too."""
    with pytest.raises(FileError, match=r"none\.x"):
        read(tmp_path / "none.x")
    with pytest.raises(UserError):
        read_classes(tmp_path / "none.x", 0)


@pytest.mark.parametrize("read", [load_checkpoint, read_foreign, read_image, read_label])
def test_a_file_that_was_cut(read: Callable[[Path], object], tmp_path: Path) -> None:
    """Protects callers: every reader says the same class of error for bytes that are not those that were written."""
    path = tmp_path / "cut"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(Damaged):
        read(path)

"""Exports a network to run without bcmf_ext: python -m bcmf_ext.export --checkpoint runs/NAME/best.pt --format onnx."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

from .errors import UserError, command, run_command
from .files import ZIP_MARK, check_replaceable, write_file
from .inference import InferenceNetwork, load_network, not_finite, read_checkpoint

COMMAND = "bcmf_ext.export"
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
# From opset 20 on, GridSample's mode is called linear, and TensorRT up to 11.1 then takes the nearest pixel in silence.
OPSET = 18
# The exported network is run on so many images of this height and width.
TRIED = ((1, 360, 480), (2, 97, 130), (1, 64, 64))
# This share of labels must be equal, and logits may differ by this share of the largest one.
LEAST_EQUAL, MOST_OFF = 0.999, 1e-3


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Writes the network, runs what was written, and prints how far its results are from the network's own."""
    parser = argparse.ArgumentParser(
        "python -m bcmf_ext.export",
        usage="%(prog)s --checkpoint PATH --format onnx|torch-export [flags]",
        description="Exports a network: from uint8 RGB images (N, 3, H, W) of any size, as files hold them, to the "
        "class of each pixel, (N, H, W) uint8.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run, or its folder"
    )
    parser.add_argument("--format", required=True, choices=tuple(ENDINGS), help="ONNX, or a program of torch.export")
    parser.add_argument("--output", metavar="FILE", help="where to write; beside the checkpoint when left out")
    parser.add_argument("--logits", action="store_true", help="end with logits of the network's own size, fp32")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file of that name that this command has not made"
    )
    args = parser.parse_args(argv)
    if args.format == "onnx":
        check_onnx()

    checkpoint = Path(args.checkpoint)
    checkpoint = checkpoint / "best.pt" if os.path.isdir(checkpoint) else checkpoint
    ending = ENDINGS[args.format]
    output = Path(args.output) if args.output else checkpoint.with_suffix(ending)
    if output.suffix != ending:
        raise UserError(f"--output {output} is a file of --format {args.format}, so its name has to end in {ending}.")
    if not args.overwrite:
        check_replaceable([output], COMMAND, "output")
    saved = read_checkpoint(checkpoint)
    network = ExportedNetwork(load_network(saved, checkpoint, impl="torch"), saved, args.logits)
    print("tracing the network …")
    program = trace(network)
    print("translating the network …")
    classes = list(saved["classes"])
    if args.format == "onnx":
        exported, run = to_onnx(program, "logits" if args.logits else "labels", classes)
    else:
        exported, run = to_program(program, classes)
    print("running what came out …")
    equal = compare(network, run, checkpoint)
    write_file(output, exported)
    print(f"{output}: {equal}")


class ExportedNetwork(nn.Module):
    """The network that is exported: uint8 images (N, 3, H, W) to the class of each pixel, (N, H, W) uint8, or to
    logits; in plain PyTorch, fp32."""

    def __init__(self, network: nn.Module, saved: dict[str, Any], logits: bool) -> None:
        super().__init__()
        self.network = InferenceNetwork(network, saved["mean"], saved["std"])
        self.align_corners, self.logits = saved["align_corners"], logits

    def forward(self, images: Tensor) -> Tensor:
        """Labels (N, H, W) uint8 of uint8 images (N, 3, H, W), or their logits."""
        logits = self.network(images)
        if self.logits:
            return logits
        # This is one operator of ONNX, which every runtime knows; reference.resample differs in the last digit.
        full = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return full.argmax(1).to(torch.uint8)


def trace(network: nn.Module) -> torch.export.ExportedProgram:
    """The network for any number of images of any height and width."""
    images = torch.zeros(2, 3, 640, 704, dtype=torch.uint8)
    sides = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    # Without this, sizes whose maps have a single pixel somewhere (at 1/512: those below 513) would be cases apart.
    with shape_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(network.eval(), (images,), dynamic_shapes=(sides,))


def check_onnx() -> None:
    """Raises `UserError` if a package is missing that writes or runs ONNX."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install 'bcmf_ext[export]', or the packages alone."
        )


Run = Callable[[Tensor], Tensor]


def to_onnx(program: torch.export.ExportedProgram, result: str, classes: list[str]) -> tuple[bytes, Run]:
    """The program as an ONNX file, with the names of the classes in its metadata; and what runs it."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # It would complain that torchvision's ops are not there.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=OPSET, input_names=["images"], output_names=[result]
        )
    assert onnx is not None
    model = onnx.model_proto
    name_sides(model.graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = "classes", json.dumps(classes)
    model.producer_name = COMMAND
    file = model.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return file, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def name_sides(graph: Any) -> None:
    """Calls the sizes that may change N, H and W, as users of the file ask for them, not as tracing numbered them."""
    names = {side.dim_param: name for side, name in zip(graph.input[0].type.tensor_type.shape.dim, "NCHW", strict=True)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), side.dim_param)


def to_program(program: torch.export.ExportedProgram, classes: list[str]) -> tuple[bytes, Run]:
    """Writes the network as a file for `torch.export.load`, with the names of the classes in its extra file
    classes.json."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"classes.json": json.dumps(classes), ZIP_MARK: COMMAND})
    file = buffer.getvalue()
    return file, torch.export.load(io.BytesIO(file)).module()


@torch.inference_mode()
def compare(network: ExportedNetwork, run: Run, checkpoint: Path) -> str:
    """How equal the results are. Raises `UserError` if what was exported computes something else."""
    generator = torch.Generator().manual_seed(0)
    sizes = ", ".join(f"{n}×{height}×{width}" for n, height, width in TRIED)
    results = []
    for n, height, width in TRIED:
        images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
        expected, found = network(images), run(images)
        if not network.network(images).isfinite().all():  # The class of such a pixel is 0 in both, so they would agree.
            raise UserError(not_finite(checkpoint, "noise"))
        if network.logits:
            results.append((found - expected).abs().max() / expected.abs().max())
        else:
            results.append((found == expected).double().mean())
    # It is NaN if one of them is.
    worst = (torch.stack(results).max() if network.logits else torch.stack(results).min()).item()
    if not (worst <= MOST_OFF if network.logits else worst >= LEAST_EQUAL):
        raise UserError(
            f"The export of {checkpoint} does not compute what the network does ({worst:g}), so nothing was written: "
            "please report it."
        )
    if network.logits:
        return f"logits differ by at most {worst:.0e} of the largest one, at {sizes}"
    return f"labels are equal at {worst:.4%} of the pixels, at {sizes}"


if __name__ == "__main__":
    run_command(main)

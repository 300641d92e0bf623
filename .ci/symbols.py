"""Holds the library in a wheel to what it may need of others: ``symbols.py WHEEL``. So it loads beside every torch,
Python and glibc that the wheel's name promises.

It may need C functions that torch has had since the oldest release (torch-2.11-symbols.txt), and versioned symbols,
which are those of glibc and gcc: how old these may be is auditwheel's part. The list is that of torch 2.11.0 from PyPI:

    nm -D --defined-only .../site-packages/torch/lib/libtorch_cpu.so |
        sed -nE 's/.* T ((aoti_)?torch_.*)/\\1/p' | LC_ALL=C sort > .ci/torch-2.11-symbols.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

OLDEST = "2.11"
LIST = Path(__file__).with_name(f"torch-{OLDEST}-symbols.txt")
LIBRARY = "bcmf_ext/_kernels.so"
NEEDED = (
    *("libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1"),
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"),  # glibc's
)
HOOKS = ("__cxa_finalize", "__gmon_start__", "_ITM_registerTMCloneTable", "_ITM_deregisterTMCloneTable")  # of gcc
OF_TORCH = re.compile(r"(?<!\d)(3c10|2at|5torch)\d")  # a namespace, and the length of the name that follows


def complaints(nm: Sequence[str], readelf: Sequence[str], functions: Collection[str]) -> Iterator[str]:
    """What is wrong with a library, a sentence each. nm, readelf: the lines of ``nm -D`` and ``readelf -d``; functions:
    the C functions of the oldest torch."""
    for line in nm:
        *_, kind, symbol = line.split()
        missing = kind in "Uwv" and symbol not in HOOKS
        if OF_TORCH.search(symbol):
            yield f"{symbol} is C++ of torch, which the next release may have no longer: use the stable ABI."
        elif missing and symbol.startswith(("Py", "_Py")):
            yield f"{symbol} is Python's, and the library has to load in every Python."
        elif missing and symbol.startswith(("torch_", "aoti_torch_")) and symbol not in functions:
            yield f"{symbol} is not in torch {OLDEST}."
        elif missing and "@" not in symbol and symbol not in functions:
            yield f"{symbol} has no version, so that only luck says which library it is taken from."
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", "\n".join(readelf)):
        if library not in NEEDED:
            yield f"{library} is needed, and not among {', '.join(NEEDED)}."


def output(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in wheel.namelist() if ".so" in name]
        if libraries != [LIBRARY]:
            sys.exit(f"{sys.argv[1]} holds {', '.join(libraries) or 'no library'}, and not {LIBRARY} alone.")
        file = wheel.extract(LIBRARY, folder)
        nm, readelf = output("nm", "-D", file), output("readelf", "-d", file)
    found = list(complaints(nm, readelf, set(LIST.read_text().split())))
    if found:
        sys.exit("\n".join(found))
    used = sum(line.split()[-1].startswith(("torch_", "aoti_torch_")) for line in nm)
    print(f"{LIBRARY} needs {used} functions of torch, all of them in {OLDEST}, and nothing else but glibc's and gcc's")


if __name__ == "__main__":
    main()

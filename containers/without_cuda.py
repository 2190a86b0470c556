#!/usr/bin/env python3
"""Makes a CUDA build of torch import where NVIDIA's libraries are not installed: 2 GB less.

Package indexes carry torch for Linux as a CUDA build alone, and its extension is linked against
cuBLAS, cuDNN, NCCL and the rest, so that it does not load without them although a CPU never calls
them. For each library that torch's own files need and this machine lacks, an empty one is written
into torch/lib, in which every function returns an error. With a CPU build of torch nothing is
missing and nothing is written. Needs binutils. The small libraries that torch does call at its
start (libcudart, libcupti, libcufile) stay real: install their packages.

    python3 without_cuda.py [SITE-PACKAGES]
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

CUDA_ERROR = 999  # "unknown": each of these libraries takes what is not 0 for a failure


def read(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def missing(libraries: list[Path], site: Path) -> set[str]:
    """Names that `libraries` need, and neither site-packages nor the system has."""
    have = {path.name for path in site.rglob("lib*.so*")}
    have |= {line.split()[0] for line in read("/sbin/ldconfig", "-p").splitlines()[1:]}
    needed = {
        name
        for library in libraries
        for name in re.findall(r"NEEDED\s+(\S+)", read("objdump", "-p", library))
    }
    # The driver's own library is looked for at run time.
    return {name for name in needed - have if not name.startswith(("ld-linux", "libcuda."))}


def wanted(libraries: list[Path], names: set[str]) -> dict[tuple[str, str], set[str]]:
    """(library, symbol version or "") -> the functions that are asked of it."""
    functions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for library in libraries:
        home: dict[str, str] = {}  # symbol version -> library
        for part in re.split(r"required from ", read("objdump", "-p", library))[1:]:
            name, _, rows = part.partition(":")
            home |= {row.split()[3]: name for row in rows.splitlines() if row.startswith("    0x")}
        for symbol, version in re.findall(
            r" UND (\w+)(?:@(\S+))?", read("readelf", "--dyn-syms", "-W", library)
        ):
            if version:
                name = home.get(version, "")
            else:  # no versions: a function of libnccl.so.2 begins with `nccl`
                stems = {n: n.removeprefix("lib").split(".")[0] for n in names}
                name = max((n for n in names if symbol.startswith(stems[n])), key=len, default="")
            if name in names:
                functions[name, version].add(symbol)
    return functions


def write(name: str, functions: dict[str, set[str]], out: Path) -> None:
    """`functions`: of each symbol version."""
    lines = [".text", *(f".globl {f}\n.type {f},@function\n{f}:" for f in sum_of(functions))]
    lines.append(f"mov ${CUDA_ERROR}, %eax\nret")
    # Without this note the stack is asked to be executable, which glibc 2.41 refuses.
    lines.append('.section .note.GNU-stack,"",@progbits')
    versions = [f"{v} {{ {' '.join(f'{f};' for f in fs)} }};" for v, fs in functions.items() if v]
    with tempfile.TemporaryDirectory() as folder:
        source, binary, script = (Path(folder) / end for end in ("s", "o", "map"))
        source.write_text("\n".join(lines) + "\n")
        script.write_text("\n".join(versions) or "{ *; };")
        read("as", "-o", binary, source)
        read("ld", "-shared", "-soname", name, "--version-script", script, "-o", out, binary)


def sum_of(functions: dict[str, set[str]]) -> list[str]:
    return sorted(set().union(*functions.values()))


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("platlib"))
    libraries = sorted((site / "torch" / "lib").glob("*.so"))
    names = missing(libraries, site)
    functions = wanted(libraries, names)
    for name in sorted(names):
        own = {version: found for (lib, version), found in functions.items() if lib == name}
        write(name, own, site / "torch" / "lib" / name)
        print(f"{name}: stands in with {len(sum_of(own))} functions")


if __name__ == "__main__":
    main()

"""C sources compiled by this machine's GCC, once, and kept in the user's cache folder."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distcond.errors import ConfigError

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
"NOTE: -fopenmp when compiling, not when linking: torch has brought an OpenMP, and two of them would fight for the cores."


def cache_folder() -> Path:
    """Where compiled libraries are kept: distcond/kernels in XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distcond" / "kernels"


def load_compiled(source: Path, signatures: Mapping[str, tuple[Any, Sequence[Any]]] = MappingProxyType({})) -> ctypes.CDLL:
    """The library made of a C file and the headers beside it, compiled if this machine has not done so yet.

    signatures: result and arguments of what it calls distcond_..., as ctypes.
    Raises ConfigError where there is no GCC, or where it fails.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise ConfigError("cluster.kernels=native needs a C compiler, gcc, on PATH; install one or use cluster.kernels=torch.")
    library = cache_folder() / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    if not library.exists():
        _compile(compiler, source, library)
    loaded = ctypes.CDLL(str(library))
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"distcond_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def _fingerprint(source: Path, compiler: str) -> str:
    """Of all that the result depends on: sources, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = [" ".join(FLAGS).encode(), version, _processor().encode()]
    parts += [file.read_bytes() for file in sorted([source, *source.parent.glob("*.h")])]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # several ranks may do this at once
        objects, result = Path(folder) / "object.o", Path(folder) / library.name
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(objects)],
            [compiler, "-shared", str(objects), "-o", str(result)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                line = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
                raise ConfigError(f"cluster.kernels=native: {compiler} cannot compile {source.name} ({line}); use torch.")
        result.replace(library)

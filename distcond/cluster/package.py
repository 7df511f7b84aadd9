"""What travels to a Ray cluster: one zip with the checkout (where there is one) and the resolved configuration."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import distcond
from distcond.compose import save_config
from distcond.config import Config
from distcond.errors import ClusterError

CONFIG_FILE = "submit.yaml"
"Name of the resolved configuration inside the package."
MAX_BYTES = 100 * 2**20
"Most that is sent, before compression. Ray itself stops at 512 MiB, but code alone is a thousand times smaller."
SKIPPED_FOLDERS = {"runs", "wandb", "outputs", "build", "dist", "node_modules", "__pycache__"}
EARLIEST_TIME = (1980, 1, 1, 0, 0, 0)
"One time for every entry, so that equal contents make an equal zip and Ray finds it in its cache."


@dataclass(frozen=True, slots=True)
class Contents:
    """Files of the package, paths relative to `root`; no root and no files where distcond is installed as a wheel."""

    root: Path | None
    files: list[Path]
    num_bytes: int


def find_checkout() -> Path | None:
    """The checkout that the running distcond comes from, or None where it was installed as a wheel."""
    root = Path(distcond.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "conf").is_dir() else None


def list_contents(root: Path | None) -> Contents:
    """What of a checkout is sent: all but hidden files, virtual environments, run folders, caches and builds.

    Raises ClusterError where that is more than code.
    """
    if root is None:
        return Contents(None, [], 0)
    files = sorted(_walk(root))
    sizes = {file: (root / file).stat().st_size for file in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = max(files, key=lambda file: sizes[file])
        raise ClusterError(
            f"{root} holds {total / 2**20:.0f} MiB, more than the {MAX_BYTES / 2**20:.0f} MiB "
            f"that are sent to a cluster; move data out of it (largest: {largest}, {sizes[largest] / 2**20:.0f} MiB)."
        )
    return Contents(root, files, total)


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not _is_skipped(Path(folder, name))]
        paths = (Path(folder, file) for file in files if not file.startswith("."))
        yield from (path.relative_to(root) for path in paths if path.is_file())  # no broken link, no socket


def _is_skipped(folder: Path) -> bool:
    name = folder.name
    return name.startswith(".") or name in SKIPPED_FOLDERS or name.endswith(".egg-info") or (folder / "pyvenv.cfg").is_file()


def write_package(contents: Contents, config: Config, folder: Path) -> Path:
    """Write the package into `folder`; returns the zip. Equal contents give equal bytes."""
    config_file = folder / CONFIG_FILE
    save_config(config, config_file)
    package = folder / "package.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, config_file, CONFIG_FILE)
        for file in contents.files:
            assert contents.root is not None
            _add(archive, contents.root / file, file.as_posix())
    return package


def _add(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name, EARLIEST_TIME)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (file.stat().st_mode & 0o777) << 16
    archive.writestr(entry, file.read_bytes())

"""Where the files that ship with distcond are: `conf/` and `launch/`."""

from pathlib import Path


def resource_dir(name: str) -> Path:
    """Directory shipped with distcond: inside the wheel, else beside the package in a checkout."""
    package = Path(__file__).parent
    for directory in (package / name, package.parent / name):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"distcond/{name} is in neither {package} nor {package.parent}; reinstall distcond")

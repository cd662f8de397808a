"""Fashion-MNIST: in the user's cache, in Debian's dataset package, or from its public home with a checksum."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nervure._kit import BadData
from nervure.data.splits import Arrays

HOME = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
# Of the unpacked content: the packers of different homes compress the same bytes differently.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def cache_dir() -> Path:
    """Return nervure's cache folder: ``$NERVURE_CACHE``, or ``nervure`` in the user's cache."""
    chosen = os.environ.get("NERVURE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nervure"


def find() -> Path | None:
    """Return the folder that has all four files, or None."""
    for folder in (cache_dir() / "fashion-mnist", SYSTEM):
        if all((folder / name).is_file() for name in FILES):
            return folder
    return None


def fetch_fashion_mnist(*, say: Callable[[str], None] = lambda _: None) -> Path:
    """Bring Fashion-MNIST into the cache.

    Every file is written beside its place and moved there only when its checksum is right, so that an
    interrupted download leaves nothing half-written and can simply be started again.

    Args:
        say: Called with a line of text for every step.

    Returns:
        The folder with the four files.

    Raises:
        BadData: If no source could be reached, with what each of them said.
    """
    found = find()
    if found is not None:
        return found
    folder = cache_dir() / "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for name, source in {"Debian's package": _from_debian, "the public home": _from_home}.items():
        try:
            source(folder, say)
            return folder
        except (OSError, EOFError, urllib.error.URLError, subprocess.SubprocessError, zlib.error, BadData) as error:
            problems.append(f"{name}: {error}")
    raise BadData(
        "Fashion-MNIST cannot be had",
        found="; ".join(problems),
        try_=f"apt install {DEBIAN_PACKAGE}, or put its four .gz files into {folder}, or use --data digits",
    )


def _from_debian(folder: Path, say: Callable[[str], None]) -> None:
    # Debian's package, unpacked without installing it
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise BadData("no apt-get and dpkg-deb on this machine")
    say(f"looking for Debian's package {DEBIAN_PACKAGE}")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["apt-get", "download", DEBIAN_PACKAGE], cwd=scratch, check=True, capture_output=True, timeout=120
        )
        package = next(Path(scratch).glob("*.deb"), None)
        if package is None:
            raise BadData("apt-get brought no package")
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True, capture_output=True, timeout=60)
        for name in FILES:
            source = Path(scratch) / SYSTEM.relative_to("/") / name
            _place(source.read_bytes(), folder / name)


def _from_home(folder: Path, say: Callable[[str], None]) -> None:
    for name in FILES:
        if (folder / name).is_file():
            continue
        say(f"downloading {name}")
        with urllib.request.urlopen(HOME + name, timeout=30) as answer:
            _place(answer.read(), folder / name)


def _place(content: bytes, target: Path) -> None:
    digest = hashlib.sha256(gzip.decompress(content)).hexdigest()
    if digest != FILES[target.name]:
        raise BadData(
            f"{target.name} arrived damaged", expected=f"sha256 {FILES[target.name]}", found=digest, try_="again"
        )
    partial = target.with_suffix(".part")
    partial.write_bytes(content)
    partial.replace(target)


def _images(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)


def _labels(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def fashion_mnist() -> Arrays:
    """Read Fashion-MNIST, fetching it if need be.

    Returns:
        60,000 training and 10,000 test images of shape (1, 28, 28).
    """
    folder = fetch_fashion_mnist()
    names = list(FILES)
    return Arrays(
        "fashion-mnist",
        _images(folder / names[0]),
        _labels(folder / names[1]),
        _images(folder / names[2]),
        _labels(folder / names[3]),
    )

"""Load a data set by name, or the user's own from a file, a folder or a factory."""

from __future__ import annotations

import csv
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nervure._kit import BadData, MissingExtra, UnknownId, did_you_mean
from nervure.core.factory import load_factory
from nervure.data.fashion import fashion_mnist
from nervure.data.splits import Arrays, Splits, split

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def _sklearn(name: str) -> Arrays:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name.replace('-', '_')}")()
    x = np.asarray(bunch.data, dtype=np.float32)
    if name == "digits":
        x = x.reshape(-1, 1, 8, 8)
    return Arrays(name, x, np.asarray(bunch.target, dtype=np.int64))


def _blobs() -> Arrays:
    """Eight Gaussian clusters in 16 dimensions, two to a class: no line separates the classes."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(8, 16)) * 1.5
    cluster = draw.integers(8, size=2400)
    x = centres[cluster] + draw.normal(size=(2400, 16))
    return Arrays("blobs", x.astype(np.float32), (cluster % 4).astype(np.int64))


NAMED: dict[str, Callable[[], Arrays]] = {
    "digits": functools.partial(_sklearn, "digits"),
    "breast-cancer": functools.partial(_sklearn, "breast-cancer"),
    "wine": functools.partial(_sklearn, "wine"),
    "blobs": _blobs,
    "fashion-mnist": fashion_mnist,
}


def names() -> list[str]:
    """Return the names of the data sets that come with nervure."""
    return sorted(NAMED)


def load(spec: str, *, seed: int = 0, train: int | None = None, test: int | None = None, validation: int = 0) -> Splits:
    """Load and split a data set.

    Args:
        spec: A name from `names`; an ``.npz`` with ``x`` and ``y`` (and ``x_test``, ``y_test``) or
            ``x_train``...; a ``.csv`` whose last column, or column ``label``, is the class; a folder with one
            sub-folder of images a class; or ``path.py:factory`` returning (x, y) or (x, y, x_test, y_test); tensors x
            of torch.long are tokens and stay as they are.
        seed: Decides which samples go where.
        train: Number of training samples, or None for all.
        test: Number of test samples, or None for all.
        validation: Number of validation samples.

    Returns:
        The splits.

    Examples:
        >>> load("digits", seed=1, test=300).test_x.shape
        torch.Size([300, 1, 8, 8])
    """
    return split(_arrays(spec), seed=seed, train=train, test=test, validation=validation)


@functools.lru_cache(maxsize=4)
def _arrays(spec: str) -> Arrays:
    if spec in NAMED:
        return NAMED[spec]()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix in (".npz", ".csv"):
        if not path.is_file():
            raise BadData("there is no such file", found=str(path))
        if path.stat().st_size == 0:
            raise BadData(f"{path} is empty")
        return _from_npz(path) if path.suffix == ".npz" else _from_csv(path)
    if ":" in spec:
        return _from_factory(spec)
    near = did_you_mean(spec, names())
    raise UnknownId(
        f"there is no data set {spec!r}",
        expected=f"one of {', '.join(names())}, an .npz, a .csv, a folder of images or path.py:factory",
        try_=" or ".join(near) or None,
    )


def _from_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadData(f"{path} cannot be read as .npz without unpickling", found=str(error)) from error

    def first(*options: str) -> np.ndarray | None:
        return next((found[name] for name in options if name in found), None)

    x, y = first("x", "x_train", "X", "X_train"), first("y", "y_train")
    if x is None or y is None:
        raise BadData(f"{path} has no inputs and labels", expected="arrays named x and y", found=sorted(found))
    return Arrays(path.name, x, y, first("x_test", "X_test"), first("y_test"))


def _from_csv(path: Path) -> Arrays:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise BadData(f"{path} is empty")
    header = rows[0] if any(not _is_number(cell) for cell in rows[0]) and not _text_labels_only(rows) else None
    body = rows[1:] if header else rows
    column = header.index("label") if header and "label" in header else len(rows[0]) - 1
    width = len(rows[0])
    for number, row in enumerate(body, start=2 if header else 1):
        if len(row) != width:
            raise BadData(f"{path} line {number} is ragged", expected=f"{width} cells", found=len(row))
    try:
        x = np.array([[float(cell) for i, cell in enumerate(row) if i != column] for row in body], dtype=np.float32)
    except ValueError as error:
        raise BadData(
            f"{path} has a feature that is no number", found=str(error), try_="encode text columns first"
        ) from error
    labels = [row[column].strip() for row in body]
    return Arrays(path.name, x, _class_numbers(labels))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _text_labels_only(rows: list[list[str]]) -> bool:
    """Tell a first row of data with a text label from a header: its features are numbers."""
    return len(rows[0]) > 1 and all(_is_number(cell) for cell in rows[0][:-1])


def _class_numbers(labels: list[str]) -> np.ndarray:
    """Keep whole numbers from zero as they are; number everything else in alphabetical order."""
    if all(label.isdigit() for label in labels):
        return np.array([int(label) for label in labels], dtype=np.int64)
    known = {label: index for index, label in enumerate(sorted(set(labels)))}
    return np.array([known[label] for label in labels], dtype=np.int64)


def _from_folder(path: Path) -> Arrays:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "images") from error
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_ENDINGS
    ]
    if not files:
        raise BadData(
            f"{path} has no images", expected="one sub-folder of images a class", found=f"{len(folders)} folders"
        )
    images = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                images.append(np.asarray(image if image.mode == "L" else image.convert("RGB")))
        except OSError as error:
            raise BadData(f"{file} cannot be read as an image", found=str(error), try_="removing it") from error
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise BadData(f"the images in {path} differ in size", found=sorted(map(str, shapes))[:4], try_="resizing them")
    x = np.stack(images)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return Arrays(path.name, x, np.array([label for _, label in files], dtype=np.int64))


def _from_factory(spec: str) -> Arrays:
    made = load_factory(spec)()
    if not isinstance(made, tuple) or len(made) not in (2, 4):
        raise BadData(
            f"{spec} returned no data", expected="(x, y) or (x, y, x_test, y_test)", found=type(made).__name__
        )
    x, y, *held = (np.asarray(part) for part in made)
    test_x, test_y = held or (None, None)
    # An image is uint8 and a table is real; whoever hands over torch's long means what an embedding takes.
    tokens = isinstance(made[0], torch.Tensor) and made[0].dtype in (torch.int32, torch.int64)
    return Arrays(spec, x, y, test_x, test_y, tokens=tokens)

"""Import the user's own model or data: ``path/to/file.py:factory`` or ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nervure._kit import BadModel, UsageError


def load_factory(spec: str) -> Callable[..., Any]:
    """Import what ``spec`` names.

    Args:
        spec: ``path/to/file.py:name`` or ``package.module:name``.

    Returns:
        The named object.

    Raises:
        UsageError: If `spec` is not of that form or the file does not exist.
        BadModel: If the file cannot be imported or has no such name.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError("the factory is not named right", expected="path/to/file.py:factory", found=spec)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UsageError:
        raise
    except Exception as error:
        raise BadModel(
            f"{place} cannot be imported", found=f"{type(error).__name__}: {error}", try_=f"python {place}"
        ) from error
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise BadModel(f"{place} has no {name!r}", expected=f"one of {', '.join(public) or 'none'}", found=name)
    found: Callable[..., Any] = getattr(module, name)
    return found


def _from_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UsageError("there is no such file", found=str(path), try_="a path relative to the present folder")
    name = f"nervure_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("the file is not Python", expected="a file ending in .py", found=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by its name
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def build_model(spec: str, **options: Any) -> nn.Module:
    """Build the user's model.

    Args:
        spec: As in `load_factory`; the name may also be a module already.
        **options: Passed to the factory; none by default.

    Returns:
        The model.

    Raises:
        BadModel: If the factory raises or does not return an `nn.Module`.
    """
    factory = load_factory(spec)
    try:
        model = factory if isinstance(factory, nn.Module) else factory(**options)
    except Exception as error:
        raise BadModel(
            f"the factory {spec} raised", found=f"{type(error).__name__}: {error}", try_="calling it by hand"
        ) from error
    if not isinstance(model, nn.Module):
        raise BadModel(f"the factory {spec} returned no model", expected="an nn.Module", found=type(model).__name__)
    return model


def fingerprint(spec: str) -> str:
    """Return a digest of the file behind a factory, so that an edited file counts as another experiment.

    Args:
        spec: As in `load_factory`; anything that is not a file gives the digest of the text itself.

    Returns:
        Twelve hexadecimal digits.
    """
    place = Path(spec.rpartition(":")[0] or spec).expanduser()
    content = place.read_bytes() if place.is_file() else spec.encode()
    return hashlib.sha256(content).hexdigest()[:12]

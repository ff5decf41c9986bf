"""Find the layers that a request names: of the catalogue, of a module, of a file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from surflow.errors import UserError, close_match
from surflow.transforms import Transform, catalogue


def find_layers(spec: str) -> dict[str, type[Transform]]:
    """The classes that a request names, by the request that names each of them alone.

    Args:
        spec: a name of the catalogue; ``package.module.Class``; ``file.py:Class``; or a module or
            a file alone, for every concrete transform that it defines.

    Raises:
        UserError: where one is missing, cannot be imported, is abstract or has no example.
    """
    known = {cls.__name__: cls for cls in catalogue()}
    if spec in known:
        return {spec: _provable(known[spec], spec)}
    if "." not in spec and ":" not in spec:
        near = difflib.get_close_matches(spec, known, 3, cutoff=0.5)
        near = near or [k for k in known if spec.lower() in k.lower()][:3]
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise UserError(
            f"layers: no layer {spec!r} in the catalogue{hint}; a layer of your own is "
            "package.module.Class or ./file.py:Class"
        )
    module, name, path = _module_of(spec)
    if name and hasattr(module, name):
        return {spec: _provable(getattr(module, name), spec)}
    own = {
        k: v
        for k, v in vars(module).items()
        if inspect.isclass(v) and issubclass(v, Transform) and v.__module__ == module.__name__
    }
    if name:
        match = close_match(name, own)
        there = f"; transforms there: {', '.join(own)}" if own and not match else ""
        raise UserError(f"layers: {spec}: no class {name!r} in {path}{match}{there}")
    concrete = [k for k, v in own.items() if not (inspect.isabstract(v) or k.startswith("_"))]
    if not concrete:
        raise UserError(f"layers: {spec}: defines no transform of its own")
    prefix = path + (":" if path.endswith(".py") else ".")
    return {prefix + k: _provable(own[k], prefix + k) for k in concrete}


def _module_of(spec: str) -> tuple[ModuleType, str, str]:
    """The module or file that a request names, the class in it or "", and how it names them."""
    path, _, name = spec.rpartition(":" if ":" in spec else ".")
    if spec.endswith(".py"):
        path, name = spec, ""
    if path.endswith(".py"):
        return _import_file(path), name, path
    with _importing(path, spec):
        module, inner = importlib.import_module(path), f"{path}.{name}"
        package = hasattr(module, "__path__") and not hasattr(module, name)
        if package and importlib.util.find_spec(inner):
            importlib.import_module(inner)
    found = getattr(module, name, None)
    return (found, "", inner) if isinstance(found, ModuleType) else (module, name, path)


def one_line(text: object) -> str:
    """The text on one line, cut at 400 characters."""
    return textwrap.shorten(str(text), 400, placeholder="…")


@contextlib.contextmanager
def _importing(path: str, spec: str) -> Iterator[None]:
    """Import from the working folder too; one sentence says what broke an import, and where."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise UserError(
                f"layers: {spec}: no module {error.name!r} here or among the installed packages; "
                "a file is named by its path, such as ./my_layer.py:MyLayer"
            ) from None
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        frames = [f for f in frames if "importlib" not in f[0] and f[0] != __file__]
        if isinstance(error, SyntaxError):
            frames = [(error.filename or "?", error.lineno)]
        said = f"{type(error).__name__}: {one_line(getattr(error, 'msg', None) or error)}"
        said += "".join(f" ({Path(file).name}, line {line})" for file, line in frames[-1:])
        raise UserError(f"layers: {spec}: cannot be imported: {said}") from None


def _import_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"layers: {path}: no such file")
    # a unique name: the file may be called like a module that is loaded already
    name = f"_verified_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        with _importing(path, path):
            if str(file.parent) not in sys.path:
                sys.path.append(str(file.parent))
            found.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    return module


def _provable(cls: Any, spec: str) -> type[Transform]:
    """The class, if the suite can run on it."""
    if not inspect.isclass(cls) or not issubclass(cls, Transform):
        got = f"the class {cls.__name__}" if inspect.isclass(cls) else f"a {type(cls).__name__}"
        wrong = f"expected a subclass of surflow.transforms.Transform, got {got}"
    elif inspect.isabstract(cls):
        wrong = f"still abstract, it does not define {', '.join(sorted(cls.__abstractmethods__))}"
    elif cls.example.__func__ is Transform.example.__func__:
        wrong = (
            "has no example(); give it a classmethod that returns "
            "surflow.transforms.Example(transform, sample, base)"
        )
    else:
        return cls
    raise UserError(f"layers: {spec}: {wrong}")

"""A model of the user's own, from a function that makes it."""

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from clip_refine.errors import ModelError
from clip_refine.models.dual_encoder import DualEncoder, check_dual_encoder


def call_factory(name: str) -> DualEncoder:
    """Import a function and return the dual encoder that it makes.

    Args:
        name: `package.module:function`; the module may lie in the current folder.

    Raises:
        ModelError: There is no such module or function, it fails, or what it returns lacks
            something of a dual encoder.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ModelError(
            f"model.factory {name!r}: expected a module and a function in it, as in "
            "my_package.models:build."
        )
    module = _import(name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if _is_own(value, module_name)]
        raise ModelError(
            f"model.factory {name!r}: {module.__file__} has no function {function_name}."
            + (f" It has {', '.join(known)}." if known else "")
        )
    try:
        model = function()
    except Exception as error:
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error
    try:
        return check_dual_encoder(model)
    except ModelError as error:
        raise ModelError(f"model.factory {name!r}: {error}") from error


def _import(name: str, module_name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # the command's own folder is there, the current one is not
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(
                f"model.factory {name!r}: there is no module {error.name}, neither in {here} nor "
                "among the installed packages."
            ) from error
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error
    except Exception as error:
        raise ModelError(f"model.factory {name!r}: {_where(error)}") from error


def _is_own(value: Any, module_name: str) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module_name


def _where(error: Exception) -> str:
    """An error of the user's code with the line that it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}: {error}"

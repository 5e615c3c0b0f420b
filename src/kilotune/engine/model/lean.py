"""Lean: transformers without what it imports and kilotune never uses: torch's compiler and distributed tensors.

Two thirds of the time that `import` takes for a model go to them (torch 2.13, transformers 5.23), through a few
decorators that say "do not compile this" and a few `if distributed is available`. While the modules of transformers
are first imported the decorators do nothing and distributed is not available, as on a machine that torch was built
for without it; afterwards everything is as it was, and a later `import torch._dynamo` gets the real one.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["built_in_memory", "lean_imports", "quietly", "unhurried_gc"]

COMPILER = "torch._dynamo"


@contextmanager
def unhurried_gc() -> Iterator[None]:
    """Without the garbage collector, which would walk through everything again and again while much is made."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import transformers' model classes inside, for the first time in this process; later it changes nothing."""
    if "transformers.modeling_utils" in sys.modules:
        yield
        return
    import torch.compiler
    from transformers import utils
    from transformers.utils import import_utils

    read = getattr(import_utils, "create_import_structure_from_path", None)

    def read_once(path: str | Path) -> Any:
        """The list of all models' files, which transformers makes for itself and again for `transformers.models`."""
        assert read is not None
        return read(Path(path).parent if Path(path).parts[-2:] == ("models", "__init__.py") else path)

    with ExitStack() as stack:
        stack.enter_context(_replaced(import_utils, "create_import_structure_from_path", read_once))
        for module in (utils, import_utils):
            stack.enter_context(_replaced(module, "is_torch_distributed_available", lambda: False))
        for name in ("disable", "allow_in_graph"):
            stack.enter_context(_replaced(torch.compiler, name, _as_it_is))
        if COMPILER not in sys.modules:
            stack.enter_context(_stand_in(Path(torch.__file__).parent / "_dynamo"))
        _import_when_asked(torch.distributed, "tensor")
        yield


def _import_when_asked(package: Any, submodule: str) -> None:
    """Some libraries (peft) name a submodule that transformers would have imported for them."""
    if not hasattr(package, submodule) and not hasattr(package, "__getattr__"):

        def missing(name: str) -> Any:
            if name == submodule:
                return importlib.import_module(f"{package.__name__}.{submodule}")
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")

        package.__getattr__ = missing


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """What another version does not have is left alone: it then imports more, and works."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """A decorator, with or without arguments, that leaves the function alone."""
    return function if function is not None else _as_it_is


@contextmanager
def _stand_in(folder: Path) -> Iterator[None]:
    """A package in the compiler's place: its submodules can be imported without all the rest."""
    package = ModuleType(COMPILER)
    package.__path__ = [str(folder)]
    for name in ("disable", "allow_in_graph", "assume_constant_result"):
        setattr(package, name, _as_it_is)
    sys.modules[COMPILER] = package
    try:
        yield
    finally:
        del sys.modules[COMPILER]


@contextmanager
def built_in_memory() -> Iterator[None]:
    """`from_pretrained` inside makes the empty model in memory instead of on the meta device.

    Memory that nobody writes costs nothing, and operations on the meta device would import the compiler. What
    `from_pretrained` does then, and so what it returns, is the same.
    """
    import torch
    from transformers import PreTrainedModel
    from transformers.initialization import no_init_weights

    original: Any = PreTrainedModel.__dict__["get_init_context"]

    def contexts(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        asked = original.__func__(cls, *args, **kwargs)
        return [no_init_weights() if isinstance(one, torch.device) else one for one in asked]

    PreTrainedModel.get_init_context = classmethod(contexts)
    try:
        yield
    finally:
        PreTrainedModel.get_init_context = original


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' bars and warnings, and keep the garbage collector out of its thousands of imports."""
    with unhurried_gc():
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()

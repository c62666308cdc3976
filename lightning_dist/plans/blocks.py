"""The blocks of a network: the repeated parts that are sharded, checkpointed and compiled one by one."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from lightning_dist.compat.transformers import block_classes

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated blocks of a network, by name, in the order of the module.

    The first that answers: the classes which a transformers model declares for its blocks; else the children
    of a container (``Sequential``, ``ModuleList``, ``ModuleDict``) whose class occurs there twice and that are not
    single layers. Plain containers are looked through, so a stage of blocks gives its blocks. A network without
    repetition has none.
    """
    return _declared_blocks(module) or dict(_repeated(module, ""))


def select_blocks(
    module: nn.Module, choice: Iterable[str | type[nn.Module]] | Callable[[str, nn.Module], bool]
) -> dict[str, nn.Module]:
    """The blocks that a user chose, by name.

    Args:
        module: the whole module.
        choice: names of modules (``*`` matches within and across dots, ``"model.layers.*"``), names of classes
            (``"Block"``, or ``"my_package.Block"`` as in a config file), classes, or a function of name and module.

    Raises:
        ValueError: an entry that matches nothing, with the closest names; or blocks of which one contains another.
    """
    modules = {name: child for name, child in module.named_modules() if name}
    chosen: set[str] = set()
    if isinstance(choice, str):
        choice = [choice]
    if not isinstance(choice, Iterable):
        chosen = {name for name, child in modules.items() if choice(name, child)}
    else:
        for entry in choice:
            found = {name for name, child in modules.items() if _matches(entry, name, child)}
            if isinstance(entry, str) and "*" in entry:  # 'layers.*' means the children, not all that lies below
                found = {name for name in found if not any(name.startswith(f"{other}.") for other in found)}
            if not found:
                raise ValueError(_nothing_matches(entry, modules))
            chosen |= found
    for name in chosen:
        inner = next((other for other in chosen if other.startswith(f"{name}.")), None)
        if inner is not None:
            raise ValueError(f"shard_units chooses {name!r} and {inner!r} inside it; choose one of them")
    return {name: child for name, child in modules.items() if name in chosen}


def _declared_blocks(module: nn.Module) -> dict[str, nn.Module]:
    classes = {name for child in module.modules() for name in block_classes(child)}
    found = {name: child for name, child in module.named_modules() if class_name(child) in classes}
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    # embeddings and heads are declared too; one alone is no repeated block
    count = Counter(_kind(found[name]) for name in outermost)
    return {name: found[name] for name in outermost if count[_kind(found[name])] > 1}


def _repeated(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    kinds = Counter(_kind(child) for _, child in children)
    for name, child in children:
        if isinstance(child, Metric):
            continue
        is_repeated = isinstance(module, CONTAINERS) and kinds[_kind(child)] > 1 and not isinstance(child, CONTAINERS)
        is_composed = any(True for _ in child.children()) and any(True for _ in child.parameters())
        if is_repeated and is_composed:
            yield name, child
        else:
            yield from _repeated(child, f"{name}.")


def class_name(module: nn.Module) -> str:
    """Name of a module's class; of a sharded one, the name it had before fully_shard made a class of its own."""
    return _kind(module).__name__


def is_of(module: nn.Module, library: str, names: Container[str]) -> bool:
    """Whether a module's class is one of a library's, by its name."""
    kind = _kind(module)
    return kind.__module__.partition(".")[0] == library and kind.__name__ in names


def _kind(module: nn.Module) -> type[Any]:
    """Its class; a rank of a pipeline has sharded some of the blocks only, which are all of one kind still."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _matches(entry: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    if isinstance(entry, type):
        return isinstance(module, entry)
    if fnmatchcase(name, entry) or class_name(module) == entry:
        return True
    path, _, cls = entry.rpartition(".")
    named = getattr(sys.modules.get(path), cls, None)  # imported, or no module of the network is of it
    return isinstance(named, type) and isinstance(module, named)


def _nothing_matches(entry: object, modules: dict[str, nn.Module]) -> str:
    known = [*modules, *sorted({class_name(child) for child in modules.values()})]
    return f"shard_units names {entry!r}, which no module of the network matches{closest(str(entry), known)}"


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that matches nothing: those that are most like it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; the closest are {', '.join(close)}" if close else ""

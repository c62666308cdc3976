"""Which modules of a config the fork server holds, see [Note: ranks from a fork server].

This module imports nothing that is slow itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ALWAYS = ("recipes.job",)
"""Modules that every job needs, beside those of every run."""


def start(cfg: DictConfig) -> None:
    """Starts the fork server, if it does not run yet, and returns at once.

    Args:
        cfg: the config of the job; modules of its ``_target_`` are imported by the server.
    """
    named = _target_modules(OmegaConf.to_container(cfg, resolve=False))
    _from_file("elastic").start([*ALWAYS, *named])


def address() -> dict[str, Any]:
    """Where the fork server is, for processes that it has forked."""
    found: dict[str, Any] = _from_file("compat").server_address()
    return found


def _target_modules(node: Any) -> Iterator[str]:
    """The module of each ``_target_`` in a config."""
    if isinstance(node, dict):
        yield str(node.get("_target_")).rpartition(".")[0]
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _target_modules(item)


def _from_file(room: str) -> Any:
    """``fork_server`` of a room of lightning_dist, from its file: the package's own imports take the seconds in which
    the server can import already.
    """
    package = find_spec("lightning_dist")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / room / "fork_server.py"
    spec = spec_from_file_location(f"fork_server_of_{room}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

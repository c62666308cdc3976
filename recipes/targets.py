"""Which ``_target_`` of a config may be called.

[Note: targets]
A ``_target_`` is the name of something to import and to call, so a config file from elsewhere can run any code, as an
unpickled file can. So a config may name what is listed here, and what the user adds by ``targets=[my_package]``: on the
command line, or in ``conf/config.yaml``. In any other file (an experiment, a group, a directory of ``--config-dir``) it
is refused: a file could allow itself what it names.

Both the name and the object that is found by it have to be allowed: ``recipes.train.os.system`` begins well, and is
``posix.system``. Hydra 1.4 has a check of this kind, its execution whitelist, which gets the same list: there it also
holds for what Hydra itself makes, callbacks and handlers of the log.

This module imports nothing that is slow itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import hydra.utils
from hydra import version
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recipes.config_errors import ConfigError

ALLOWED = (
    "datetime.timedelta",
    "hydra_plugins.recipes_sweep.*",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.*",
    "lightning.pytorch.loggers.*",
    "lightning.pytorch.plugins.*",
    "lightning.pytorch.profilers.*",
    "lightning.pytorch.strategies.*",
    "lightning_dist.HybridStrategy",
    "lightning_dist.Layout",
    "lightning_dist.PipelineTimeline",
    "lightning_dist.Throughput",
    "lightning_dist.data.*",
    "recipes.benchmark.first_step.*",
    "recipes.credit_risk.*",
    "recipes.driving.*",
    "recipes.image_classification.*",
    "recipes.language_model.*",
    "recipes.medicine.*",
    "recipes.optimization.*",
    "recipes.sequence_to_sequence.*",
    "recipes.sweep.*",
    "recipes.tables.*",
    "torch.nn.*",
    "torch.optim.*",
    "torch.utils.data.*",
    "torchmetrics.*",
)
"""Names, and with ``.*`` all names below one. Not whole packages: ``torch.hub.load`` runs code, ``torch.load`` may."""

SETTING = "targets"
"""The key of a config that adds to them."""

HAS_WHITELIST = hasattr(hydra.utils, "execution_whitelist")
"""Whether Hydra is 1.4 or later."""

VERSION_BASE: dict[str, Any] = {} if HAS_WHITELIST else {"version_base": "1.3"}
"""Which defaults Hydra has: 1.3 warns if it isn't told, 1.4 if it is."""


def set_version_base() -> None:
    """Has Hydra behave in this process, which did not begin by ``hydra.main``, as it does in others."""
    if not HAS_WHITELIST:
        version.setbase(VERSION_BASE["version_base"])


_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=ALLOWED)


def allowed_by_user(conf: DictConfig, arguments: Sequence[str]) -> tuple[str, ...]:
    """The list with what the user adds to it.

    Args:
        conf: ``conf/config.yaml``.
        arguments: of the command line.
    """
    added = list(conf.get(SETTING) or ())
    for argument in arguments:
        if re.match(rf"\+{{0,2}}{SETTING}=", argument):
            value = OverridesParser.create().parse_override(argument).value()
            added = [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return (*ALLOWED, *_patterns(added))


@contextmanager
def allow(targets: tuple[str, ...]) -> Iterator[None]:
    """What may be named until this ends."""
    token = _allowed.set(targets)
    try:
        if HAS_WHITELIST:
            whitelist: Any = hydra.utils
            with whitelist.execution_whitelist(targets):
                yield
        else:
            yield
    finally:
        _allowed.reset(token)


def allowed() -> tuple[str, ...]:
    """What may be named now."""
    return _allowed.get()


def check(cfg: DictConfig) -> None:
    """Reads a composed config, before anything of it is imported.

    Raises:
        ConfigError: it names what it may not, or allows itself something.
    """
    named: Any = OmegaConf.to_container(cfg, resolve=False)
    refused = [entry for entry in _patterns(named.get(SETTING) or ()) if entry not in allowed()]
    if refused:
        raise ConfigError(
            f"{SETTING}: {refused[0]} comes from a config file that this run chose, which could allow itself what "
            f"it names; pass {SETTING}=[{refused[0]}] on the command line, or set it in conf/config.yaml"
        )
    for key, target in _targets(named, ""):
        if "${" not in target and not _is_allowed(target):
            raise ConfigError(_refusal(key, target))


def instantiate(node: Any, key: str = "", **arguments: Any) -> Any:
    """``hydra.utils.instantiate`` of what may be named only.

    Args:
        node: a config, or a part of one.
        key: of the node in the whole config, for what is raised.
        **arguments: for its target, beside those of the config.

    Raises:
        ConfigError: a target that is not allowed.
    """
    resolved = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for where, target in _targets(resolved, key):
        _check_found(where, target)
    whitelist: dict[str, Any] = {"_execution_whitelist_": allowed()} if HAS_WHITELIST else {}
    return hydra.utils.instantiate(node, **whitelist, **arguments)


def _check_found(key: str, target: str) -> None:
    if not _is_allowed(target):
        raise ConfigError(_refusal(key, target))
    if target in allowed():
        return
    try:
        found = _find(target)
    except Exception:
        return  # Hydra says it better, with the key and the cause
    name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if not _is_allowed(name):
        raise ConfigError(_refusal(key, target, name))


def _find(target: str) -> Any:
    """As Hydra finds it: an attribute, else a module."""
    path, *rest = target.split(".")
    found: Any = importlib.import_module(path)
    for part in rest:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(path)
    return found


def _is_allowed(target: str) -> bool:
    return any(
        target.startswith(entry.removesuffix("*")) if entry.endswith(".*") else target == entry for entry in allowed()
    )


def _refusal(key: str, target: str, really: str | None = None) -> str:
    package = (really or target).split(".")[0]
    return (
        f"{key}: {target}{f', which is {really},' if really else ''} is not among what a config may name; if you trust "
        f"what it runs, allow it on the command line with {SETTING}=[{package}], or in conf/config.yaml"
    )


def _patterns(names: Iterable[Any]) -> tuple[str, ...]:
    """A name, and what lies below it."""
    names = [names] if isinstance(names, str) else names
    return tuple(
        entry for name in map(str, names) for entry in ((name,) if name.endswith(".*") else (name, f"{name}.*"))
    )


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Keys and values of the ``_target_`` below a plain node."""
    if isinstance(node, dict):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return
    for name, value in items:
        where = f"{key}.{name}".lstrip(".")
        if name == "_target_" and isinstance(value, str):
            yield where, value
        else:
            yield from _targets(value, where)

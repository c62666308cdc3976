"""What is wrong with a config, told in one message: the key, why it can't be, the closest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException
from omegaconf import Container, DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)


class ConfigError(CompactHydraException):
    """The config asks for something that can't be; its text says all that a user needs, without a traceback."""


def explain(error: CompactHydraException | OmegaConfBaseException) -> str:
    """What Hydra says about a config that doesn't compose, in one message with the closest names.

    Args:
        error: what composing the config raised.
    """
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        hint = did_you_mean(str(cause.key), _keys_beside(cause))
        return f"The config has no key {cause.full_key}; write +{cause.full_key}=... to add it.{hint}"
    if isinstance(cause, MissingMandatoryValue):
        return f"The config needs a value for {cause.full_key}; pass {cause.full_key}=..."
    text = str(error).strip()
    if isinstance(cause, OmegaConfBaseException) and str(cause) not in text:
        text = f"{text}\n{cause}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        text = text.partition("Config search path:")[0].rstrip()
        text += did_you_mean(error.missing_cfg_file.rpartition("/")[2], error.options)
    return text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A line that names what is closest to ``name``, or an empty string if nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"\nDid you mean {' or '.join(close)}?" if close else ""


@contextmanager
def told_without_traceback(what: str) -> Iterator[None]:
    """Turns what a wrong value makes a constructor raise into a :class:`ConfigError`.

    Wrong values, files that aren't there, packages that aren't installed and arguments that a constructor doesn't
    take are the user's to mend, so they lose their traceback; anything else is a defect and keeps it.

    Args:
        what: the part of the config that is being built, such as ``"data"``.
    """
    try:
        yield
    except InstantiationException as error:
        cause: BaseException | None = error
        while isinstance(cause, InstantiationException):
            cause = cause.__cause__
        if cause is None:
            raise ConfigError(f"{what}: {error}") from None
        raise _told(what, cause, _where(error)) from None
    except ConfigError:
        raise
    except Exception as error:  # Hydra 1.4 lets it pass as it is, with the key as a note
        raise _told(what, error, "".join(f"({note})" for note in getattr(error, "__notes__", ()))) from None


def _told(what: str, error: BaseException, where: str) -> BaseException:
    if isinstance(error, (ValueError, OSError, ImportError)) or _is_wrong_call(error):
        return ConfigError(f"{what}: {error}\n{where}".rstrip())
    return error.with_traceback(_within_target(error))


def _keys_beside(error: OmegaConfBaseException) -> list[str]:
    parent: Container | None = error.parent_node
    return [str(key) for key in parent] if isinstance(parent, DictConfig) and not parent._is_none() else []


def _is_wrong_call(error: BaseException) -> bool:
    """Whether the arguments didn't fit the signature: then no frame of the target is in the traceback."""
    return isinstance(error, TypeError) and _within_target(error) is None


def _within_target(error: BaseException):
    """The traceback from the target's own code inwards, ``None`` if it ends in Hydra's."""
    frames = error.__traceback__
    while frames is not None and not _is_hydras(frames):  # this package's own, before it calls Hydra
        frames = frames.tb_next
    frames = frames or error.__traceback__
    while frames is not None and _is_hydras(frames):
        frames = frames.tb_next
    return frames


def _is_hydras(frames: TracebackType) -> bool:
    return frames.tb_frame.f_globals.get("__name__", "").startswith("hydra.")


def _where(error: InstantiationException) -> str:
    """``Error in call to target 'x'`` and the key, which Hydra writes around the cause's own text."""
    lines = str(error).splitlines()
    return " ".join([lines[0].rstrip(":"), *(f"({line})" for line in lines[1:] if line.startswith("full_key: "))])

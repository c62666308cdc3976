"""Private things are taken out of texts before they are written: paths, names of machine and user, addresses."""

from __future__ import annotations

import getpass
import re
import socket
from contextlib import suppress
from typing import Any

_PATH = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":,;()\[\]{}]+[/\\])+([^\s/\\'\":,;()\[\]{}]*)")
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?|\[[0-9a-fA-F:]*:[0-9a-fA-F:.%\w]*\](?::\d+)?")


def scrub(value: Any) -> Any:
    """The same without folders of paths, addresses of the network, and the names of this machine and user.

    Args:
        value: a text, or plain data with texts in it; the keys of dictionaries stay.
    """
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return _scrub_text(value) if isinstance(value, str) else value


def _scrub_text(text: str) -> str:
    text = _ADDRESS.sub("<address>", _PATH.sub(r"\1", text))
    for name, standin in _names().items():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", standin, text)
    return text


def _names() -> dict[str, str]:
    names: dict[str, str] = {}
    with suppress(OSError):
        names[socket.gethostname()] = "<machine>"
    with suppress(OSError, KeyError, ImportError):
        names[getpass.getuser()] = "<user>"
    return {name: standin for name, standin in names.items() if len(name) > 1 and name != "root"}

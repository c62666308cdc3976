"""Shards of a store whose files are not those that were written, and a store without them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_dist.checkpoint.checksums import checksum_of
from lightning_dist.data.tokens.format import TOKENIZER, Shard, StoreIndex, lost_part, read_index, write_index

_THREADS = 4


@dataclass(frozen=True)
class Damage:
    """A shard, or None for the tokenizer, and what is wrong with it in words."""

    shard: Shard | None
    what: str


def check_store(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[StoreIndex, list[Damage]]:
    """Reads every file of a store and compares size and checksum. Damage of the tokenizer comes last.

    Args:
        path: its directory.
        progress: called with the tokens that were read, and all.

    Raises:
        FileNotFoundError, DamagedStore, ValueError: see :func:`~lightning_dist.data.tokens.format.read_index`.
    """
    folder = Path(path).expanduser()
    index = read_index(folder)
    damaged: list[Damage] = []
    done = 0
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda shard: _damage(folder, index.files(shard)), index.shards)
        for shard, what in zip(index.shards, found, strict=True):
            if what is not None:
                damaged.append(Damage(shard, what))
            done += shard.num_tokens
            progress(done, index.num_tokens)
    if (what := _damage_of_tokenizer(folder, index)) is not None:
        damaged.append(Damage(None, what))
    return index, damaged


def _damage(folder: Path, files: dict[str, tuple[int, int]]) -> str | None:
    if (what := lost_part(folder, files)) is not None:
        return what
    for name, (_, crc) in files.items():
        try:
            found = checksum_of(folder / name)[1]
        except OSError as error:
            return f"{name} can't be read ({error})"
        if found != crc:
            return f"{name} has CRC-32 {found:08x}, and {crc:08x} was written"
    return None


def _damage_of_tokenizer(folder: Path, index: StoreIndex) -> str | None:
    try:
        found = hashlib.sha256((folder / TOKENIZER).read_text(encoding="utf-8").encode()).hexdigest()
    except FileNotFoundError:
        return f"{TOKENIZER} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{TOKENIZER} can't be read ({error})"
    wanted = index.settings.get("tokenizer")
    return None if found == wanted else f"{TOKENIZER} has SHA-256 {found}, and {wanted} made the tokens"


def drop_shards(path: str | os.PathLike[str], index: StoreIndex, damaged: Sequence[Damage]) -> StoreIndex:
    """Writes the index without the damaged shards, whose files stay. A damaged tokenizer stays damaged.

    Raises:
        ValueError: none would be left.
    """
    names = {damage.shard.name for damage in damaged if damage.shard is not None}
    left = tuple(shard for shard in index.shards if shard.name not in names)
    if not left:
        raise ValueError(
            f"all shards of {path} are damaged, so none would be left; remove the directory, and tokenize anew"
        )
    index = replace(index, shards=left, dropped=(*index.dropped, *sorted(names)))
    write_index(Path(path).expanduser(), index)
    return index

"""The index of sharded data: its shards with their sizes, which says all that an order needs without reading them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fsspec.core import url_to_fs

from lightning_dist.checkpoint.locations import as_path, is_remote, temporary_sibling
from lightning_dist.data.folders import files_below, first_repeated

INDEX = "shards.json"
"""The name of an index in the directory of its shards."""

FORMAT, VERSION = "lightning_dist.shards", 1

KINDS = {".tar": "tar", ".parquet": "parquet"}
"""By the end of a shard's name."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


class DamagedShard(ValueError):
    """A shard that is not what its index says, or can't be read as what its name says."""


@dataclass(frozen=True)
class Shard:
    """One file of samples: its URL, or path below the index's directory, and what was found in it."""

    name: str
    num_bytes: int
    num_samples: int
    crc32: int


@dataclass(frozen=True)
class ShardIndex:
    """Shards of one kind, in their order.

    Args:
        folder: that names are below, a path or URL without a slash at its end.
        kind: ``"tar"`` or ``"parquet"``.
        shards: in the order of their samples.
        dropped: names of shards that were left out, since they were damaged.
    """

    folder: str
    kind: str
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def url(self, shard: Shard) -> str:
        """Where a shard is."""
        return shard.name if is_absolute(shard.name) else f"{self.folder}/{shard.name}"


def is_absolute(name: str) -> bool:
    """Whether a name says by itself where its file is."""
    return "://" in name or os.path.isabs(name)


def is_url(place: str) -> bool:
    """Whether a file is reached by fsspec, and not on the local disk."""
    return "://" in place and not place.startswith(("file://", "local://"))


def local_path(place: str) -> str:
    """Of a local place, without ``file://``."""
    return re.sub(r"^(file|local)://", "", place)


def index_place(place: str | os.PathLike[str]) -> str:
    """The path or URL of an index, of which the directory may be given."""
    text = os.fspath(place)
    text = text if "://" in text else os.path.abspath(os.path.expanduser(text))
    return text if text.endswith(".json") else f"{text.rstrip('/')}/{INDEX}"


def refuse_read_only(place: str) -> None:
    """Raises a ValueError for an index at a web server, which only reads."""
    if place.startswith(("http://", "https://")):
        raise ValueError(f"{place} can't be written, since a web server is only read; pass a path with --output")


def write_index(place: str | os.PathLike[str], index: ShardIndex) -> None:
    """Puts it in place at once: by a rename, or as an object of a store."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": index.kind,
        "num_samples": index.num_samples,
        "dropped": index.dropped,
        "shards": [asdict(shard) for shard in index.shards],
    }
    refuse_read_only(index_place(place))
    path = as_path(index_place(place))
    text = json.dumps(content, indent=1)
    if is_remote(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary_sibling(path)
    beside.write_text(text)
    os.replace(beside, path)


def read_index(place: str | os.PathLike[str]) -> ShardIndex:
    """The index of shards, or of a directory of them; no shard is looked at.

    Raises:
        FileNotFoundError: there is none.
        DamagedShard: it can't be read.
        ValueError: it is of another format, or of a later version of it.
    """
    where = index_place(place)
    try:
        text = as_path(where).read_text()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no index of shards {where}; make it by `lightning-dist data index {os.fspath(place)}`"
        ) from None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(
                f"{where} is of format {content['format']} {content['version']}, and this version of lightning_dist "
                f"reads {FORMAT} {VERSION}; make it anew by `lightning-dist data index`"
            )
        shards = tuple(Shard(**shard) for shard in content["shards"])
        index = ShardIndex(where.rpartition("/")[0], content["kind"], shards, tuple(content["dropped"]))
        total = content["num_samples"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedShard(f"the index of shards {where} is damaged ({error!r}); make it anew") from error
    if total != index.num_samples or index.kind not in KINDS.values():
        raise DamagedShard(f"the index of shards {where} is damaged: its shards do not have the samples it names")
    return index


# Lists of shards


def list_shards(sources: Sequence[str | os.PathLike[str]]) -> tuple[str, list[str]]:
    """The kind of shards, and their paths or URLs: files, patterns with ``*`` or ``{000000..000999}``, directories.

    Those of a directory or a ``*`` come in the order of their names; braces in the order that they say.

    Raises:
        FileNotFoundError: nothing is there.
        PermissionError: a directory can't be listed.
        ValueError: shards of several kinds, or of one that can't be read at any place; one that is named twice.
    """
    urls: list[str] = []
    for source in sources:
        for pattern in expand_braces(os.fspath(source)):
            urls += _find(pattern)
    kinds = {kind_of(url) for url in urls}
    if not urls:
        raise FileNotFoundError(f"there are no shards at {', '.join(map(str, sources))}")
    if twice := first_repeated(urls):
        raise ValueError(
            f"{twice} is named twice, so its samples would be too; name it once (weights= of a sampler "
            "reads some indexes more often than others)"
        )
    if len(kinds) > 1:
        raise ValueError(f"{urls[0]} and others are of several kinds, {' and '.join(sorted(kinds))}; index each apart")
    return kinds.pop(), urls


def expand_braces(pattern: str) -> Iterator[str]:
    """What a pattern as ``train-{000..127}.tar`` or ``{a,b}.tar`` stands for, as in a shell."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, dots, last = found[1].partition("..")
    choices = found[1].split(",")
    if dots and first.isdigit() and last.isdigit():
        step = 1 if int(last) >= int(first) else -1
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + step, step)]
    for choice in choices:
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def kind_of(url: str) -> str:
    """Of a shard, by its name."""
    name = url.partition("?")[0]
    if name.endswith(_COMPRESSED):
        raise ValueError(f"{url} is compressed as a whole, so no sample can be read alone; unpack it to .tar")
    kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
    if kind is None:
        raise ValueError(f"{url} is no shard; shards are {' or '.join(KINDS)} files, or directories of them")
    return kind


def _find(pattern: str) -> list[str]:
    if not is_url(pattern):
        pattern = os.path.abspath(os.path.expanduser(local_path(pattern)))
    if "*" not in pattern and pattern.partition("?")[0].endswith((*KINDS, *_COMPRESSED)):
        return [pattern]
    if not is_url(pattern) and os.path.isdir(pattern):
        return [str(path) for path in files_below(Path(pattern)) if path.name.endswith(tuple(KINDS))]
    fs, path = url_to_fs(pattern)
    fs.invalidate_cache()
    if "*" in pattern:
        found = fs.glob(path)
    else:
        found = fs.find(path) if fs.isdir(path) else []
        found = [name for name in found if name.endswith(tuple(KINDS))]
    return [fs.unstrip_protocol(name) if is_url(pattern) else name for name in sorted(found)]


def relative_to(folder: str, url: str) -> str:
    """The name of a shard in an index in this folder."""
    return url.removeprefix(f"{folder}/")

"""Samples in tar files, as WebDataset has them: members with one name up to the first dot, one after the other."""

from __future__ import annotations

import io
import os
import re
import tarfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from lightning_dist.data.shards.index import DamagedShard

_BLOCK = 512
_META = re.compile(r"__[^/]*__(/|$)")
"""Names that WebDataset keeps for itself."""


@dataclass(frozen=True)
class TarMembers:
    """Where the members of a tar file lie, of ``n`` samples with ``m`` members together.

    Args:
        keys: of the samples: names up to the first dot.
        extensions: all that there are: what comes after it, in lower case.
        first: ``(n + 1,)`` int64, of each sample its first member, and m.
        extension: ``(m,)`` int64, of each member.
        offset, size: ``(m,)`` int64, of each member's bytes in the file.
    """

    keys: list[str]
    extensions: list[str]
    first: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, file: IO[bytes]) -> None:
        """For :meth:`load`."""
        joined = "\0".join([str(len(self.keys)), *self.keys, *self.extensions])
        names = np.frombuffer(joined.encode(errors="surrogateescape"), np.uint8)  # tarfile's, where it is not UTF-8
        content = io.BytesIO()  # numpy seeks to what it has not written yet
        np.savez(content, names=names, first=self.first, extension=self.extension, offset=self.offset, size=self.size)
        file.write(content.getvalue())

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> TarMembers:
        """As it was saved."""
        with np.load(file, allow_pickle=False) as content:
            count, *names = content["names"].tobytes().decode(errors="surrogateescape").split("\0")
            arrays = [content[name] for name in ("first", "extension", "offset", "size")]
        return cls(names[: int(count)], names[int(count) :], *arrays)


def read_members(file: IO[bytes], url: str) -> TarMembers:
    """Goes through the headers of a tar file, which can be sought; what is between them is not read.

    Raises:
        DamagedShard: it is none, is cut, or has what can't be read as samples.
    """
    keys: list[str] = []
    known: dict[str, int] = {}
    first: list[int] = []
    extension: list[int] = []
    offset: list[int] = []
    size: list[int] = []
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                split = split_name(member.name)
                if not member.isreg() or split is None:
                    continue
                if member.sparse is not None:
                    raise DamagedShard(f"{url} has {member.name} as a sparse file, which samples are not read from")
                key, end = split
                if not keys or key != keys[-1]:
                    keys.append(key)
                    first.append(len(offset))
                number = known.setdefault(end, len(known))
                if number in extension[first[-1] :]:
                    raise DamagedShard(f"{url} has {member.name} twice in one sample; write the shard anew")
                extension.append(number)
                offset.append(member.offset_data)
                size.append(member.size)
            end_of_members = tar.offset
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise DamagedShard(f"{url} is no tar file, or a damaged one: {error}") from error
    _check_end(file, end_of_members, url)
    arrays = (np.asarray(values, np.int64) for values in ([*first, len(offset)], extension, offset, size))
    return TarMembers(keys, list(known), *arrays)


def _check_end(file: IO[bytes], place: int, url: str) -> None:
    """tarfile takes a damaged header for the end (seen in Python 3.11), where a block of zeros has to be."""
    file.seek(place)
    if file.read(_BLOCK) != bytes(_BLOCK):
        size = file.seek(0, os.SEEK_END)
        what = "is cut" if place >= size else "is damaged"
        raise DamagedShard(f"{url} {what} at byte {min(place, size)} of {size}, where a member or the end has to be")


def split_name(name: str) -> tuple[str, str] | None:
    """The key of a member, and its extension in lower case, as WebDataset splits names; None where it is no part of a
    sample: without either, as the files that macOS puts beside others (``._a.jpg``), or of WebDataset's own.
    """
    name = name.removeprefix("./")
    folder, slash, base = name.rpartition("/")
    key, dot, end = base.partition(".")
    return None if not key or not dot or _META.match(name) else (f"{folder}{slash}{key}", end.lower())


class TarShard:
    """The samples of an open tar file; reading moves no place in it, so processes may share it.

    Args:
        file: descriptor, which it closes.
        members: of the file.
        url: for messages.
    """

    def __init__(self, file: int, members: TarMembers, url: str) -> None:
        self._file, self._members, self._url = file, members, url

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``"__key__"``, and the bytes of each member by its extension."""
        members = self._members
        sample: dict[str, Any] = {"__key__": members.keys[index]}
        for member in range(int(members.first[index]), int(members.first[index + 1])):
            sample[members.extensions[members.extension[member]]] = self._read(
                int(members.offset[member]), int(members.size[member])
            )
        return sample

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file, size, offset)
        while len(data) < size:
            more = os.pread(self._file, size - len(data), offset + len(data))
            if not more:
                raise DamagedShard(f"{self._url} has ended since it was indexed; run `lightning-dist data check`")
            data += more
        return data

    def __del__(self) -> None:
        os.close(self._file)

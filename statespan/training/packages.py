"""Readers for the package files that public-domain English travels in: Debian archives, npm tarballs, and inside them
R data bases, SWORD modules and dictd files. Standard library only; nothing is installed or executed.

Formats, from the files themselves:
- .deb: a Unix ar archive whose member data.tar.xz holds the files.
- R `Rdata.rdb`: one zlib record an object after a 4-byte big-endian size; inside, R's XDR serialization, in which a
  character vector is the header 0x10 (0x210 with attributes), its length, then flags, byte count and bytes a string.
- SWORD zText and zCom: an index of 12-byte little-endian (offset, size, unpacked size) into zlib blocks of OSIS XML.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from statespan.errors import UserError

_CHARACTER_VECTOR = re.compile(rb"\x00\x00[\x00\x02]\x10(....)", re.DOTALL)
_R_CHARSXP = 9


def read_package(path: Path) -> dict[str, bytes]:
    """Every regular file of a .deb or .tgz, by its path inside the package."""
    data = path.read_bytes()
    unpacked = lzma.decompress(_ar_member(data, path)) if path.suffix == ".deb" else gzip.decompress(data)
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        files = (member for member in archive if member.isfile())
        return {member.name.removeprefix("./"): _content(archive, member) for member in files}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None, "only regular files are asked for"
    return stream.read()


def _ar_member(data: bytes, path: Path, name: bytes = b"data.tar.xz") -> bytes:
    if not data.startswith(b"!<arch>\n"):
        raise UserError(f"{path} is not a Debian package: it does not begin with an ar header")
    at = 8
    while at < len(data):
        size = int(data[at + 48 : at + 58])
        if data[at : at + 16].rstrip(b" /") == name:
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise UserError(f"{path} holds no {name.decode()}; only xz-compressed Debian packages are read")


def r_objects(rdb: bytes) -> Iterator[list[str]]:
    """The first character vector of each object in an R data base, in file order."""
    at = 0
    while at < len(rdb):
        reader = zlib.decompressobj()
        # the 4 bytes before each record are its size and are not needed: zlib knows where it ends
        record = reader.decompress(rdb[at + 4 :])
        yield _character_vector(record)
        at = len(rdb) - len(reader.unused_data)


def _character_vector(record: bytes) -> list[str]:
    header = _CHARACTER_VECTOR.search(record)
    if header is None:
        raise UserError("an R object holds no character vector")
    at, strings = header.end(), []
    for _ in range(struct.unpack(">i", header[1])[0]):
        flags, size = struct.unpack(">ii", record[at : at + 8])
        assert flags & 0xFF == _R_CHARSXP, "a character vector holds strings only"
        strings.append(record[at + 8 : at + 8 + max(size, 0)].decode("utf-8"))
        at += 8 + max(size, 0)
    return strings


def sword_blocks(files: dict[str, bytes]) -> Iterator[str]:
    """The OSIS XML of a SWORD module's books, Old Testament first."""
    for testament in ("ot", "nt"):
        for index_name in sorted(name for name in files if re.search(rf"/{testament}\.[bc]zs$", name)):
            index, packed = files[index_name], files[index_name[:-1] + "z"]
            for offset, size, _ in struct.iter_unpack("<III", index):
                yield zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace")

# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is whole, and what may be in it, before and after it is unpickled.

torch.load does not look at the checksums of the zip archive that torch.save writes. We seal an
archive with the SHA-256 of all its bytes, in the comment that a zip may have at its end, which
other readers ignore; an archive without a seal is checked by the CRC of every member. A pickle is
counted before it is run: 200 MB of empty lists would take minutes.
"""

import contextlib
import hashlib
import io
import pickletools
import struct
import zipfile

import torch

SEAL = b"sha256 "
END_OF_ARCHIVE, END_SIZE = b"PK\x05\x06", 22  # a record whose last two bytes count a comment
CHUNK = 2**20
MOST_OPCODES = 2_000_000  # of a pickle; a checkpoint of ViT-B/16 has 60,000
LEGACY_PICKLES = 4  # magic number, protocol, system and content, at the start of files before 1.6


class NotWhole(Exception):
    """Why a file is not a whole checkpoint."""


class HashingFile:
    """A file that torch.save writes to, and the SHA-256 of all that was written."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def seal(self):
        """End the zip archive with its seal."""
        comment = SEAL + self.sha256.hexdigest().encode()
        self.file.seek(-2, io.SEEK_END)
        self.file.write(struct.pack("<H", len(comment)) + comment)


def check_whole(file):
    """Raise NotWhole unless the bytes of an open file are those that were written.

    Of files in torch's format before 1.6 only the pickles can be checked.
    """
    start = file.read(4)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not start.startswith(b"PK"):
        check_pickles(file, LEGACY_PICKLES)
        return
    with zipfile.ZipFile(file) as archive:
        check_end(file, size, archive.comment)
        if archive.comment.startswith(SEAL):
            check_seal(file, size, archive.comment)
        elif archive.comment:
            raise NotWhole("the archive's comment is not a checksum")
        check_members(archive, size, checked=bool(archive.comment))


def check_end(file, size, comment):
    file.seek(-END_SIZE - len(comment), io.SEEK_END)
    record = file.read(END_SIZE)
    if not record.startswith(END_OF_ARCHIVE) or record[-2:] != struct.pack("<H", len(comment)):
        raise NotWhole(f"{size} bytes, which do not end where the archive ends")


def check_seal(file, size, comment):
    digest, left = hashlib.sha256(), size - len(comment) - 2
    file.seek(0)
    while left and (chunk := file.read(min(CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"\0\0")  # the length of the comment when there was none
    if comment != SEAL + digest.hexdigest().encode():
        raise NotWhole("its SHA-256 is not the one that was written with it")


def check_members(archive, size, checked):
    """Stored, not compressed; together no larger than the file; with the CRC that each states."""
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise NotWhole("a compressed archive, which torch.save does not write")
    if sum(member.file_size for member in members) > size:
        raise NotWhole("the archive's members overlap")
    if not checked and (broken := archive.testzip()):
        raise NotWhole(f"{broken} does not have its checksum")
    for member in members:
        if member.filename.endswith("data.pkl"):
            with archive.open(member) as pickle:
                check_pickles(pickle, 1)


def check_pickles(file, count):
    """Raise NotWhole for pickles of too many operations; torch.load finds other mistakes."""
    operations = 0
    with contextlib.suppress(ValueError, struct.error, OverflowError):  # of somebody's bytes
        for _ in range(count):
            for _ in pickletools.genops(file):
                operations += 1
                if operations > MOST_OPCODES:
                    raise NotWhole(f"a pickle of more than {MOST_OPCODES} operations")


def find_odd_tensor(content):
    """Why a value in nested dicts, lists and tuples is not a plain tensor on the CPU, or None.

    Tensors that claim more numbers than their storage has (expanded) would fill the memory when
    something is computed of them.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if reason := odd_tensor(value):
                return f"{name.lstrip('.')} is {reason}"
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{key}", item) for key, item in items]
    return None


def odd_tensor(value):
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return f"a {str(value.layout).removeprefix('torch.')} or quantized tensor"
    if value.device.type != "cpu":
        return f"a tensor on {value.device}"
    if value.numel() > value.untyped_storage().nbytes() // value.element_size():
        return f"a tensor of shape {tuple(value.shape)} without so many numbers"
    return None

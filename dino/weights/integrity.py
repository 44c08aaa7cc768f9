# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is whole, and what may be in it, before and after it is unpickled.

torch.load does not look at the checksums of the zip archive that torch.save writes. We seal an
archive with the SHA-256 of all its bytes, in the comment that a zip may have at its end, which
other readers ignore; an archive without a seal is checked by the CRC of every member. What its
pickle does is checked before it is run.
"""

import hashlib
import io
import struct
import zipfile

import torch

from dino.printable import brief
from dino.weights.pickles import NotWhole, check_pickle

SEAL = b"sha256 "
END_OF_ARCHIVE, END_SIZE = b"PK\x05\x06", 22  # a record whose last two bytes count a comment
CHUNK = 2**20
SHOWN = 5  # keys of a place
LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of storages, before torch 1.6


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
        for _ in range(LEGACY_PICKLES):
            check_pickle(file)
        return
    with zipfile.ZipFile(file) as archive:
        check_end(file, size, archive.comment)
        if archive.comment.startswith(SEAL):
            check_seal(file, size, archive.comment)
        elif archive.comment:
            raise NotWhole("the archive's comment is not a checksum")
        check_members(archive, size, checked=bool(archive.comment))
        check_records(file, archive.namelist())


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


def check_records(file, names):
    """Check the pickle that torch's reader gets, where it finds the members of these `names`.

    It looks them up without regard to case, and might find another archive in the file.
    """
    file.seek(0)
    try:
        reader = torch._C.PyTorchFileReader(file)
        found, pickle = reader.get_all_records(), reader.get_record("data.pkl")
    except RuntimeError:
        raise NotWhole("not an archive that torch.save writes") from None
    if sorted(found) != sorted(name.partition("/")[2] for name in names):
        raise NotWhole("zipfile and torch find other members in it")
    if len({name.lower() for name in found}) < len(found):
        raise NotWhole("two members of one name")
    check_pickle(io.BytesIO(pickle))


def find_odd_tensor(content, size):
    """Why a value in nested dicts, lists and tuples is not a plain tensor on the CPU, or None.

    Tensors that claim more numbers than their storage has (expanded), or storages that together
    are larger than the `size` of their file, would fill the memory when something is computed of
    them.
    """
    waiting, seen, storages = [((), content)], set(), {}
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if reason := odd_tensor(value):
                return f"{name_of(place)} is {reason}"
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            # not value.items(), which an attribute of an OrderedDict may hide
            items = dict.items(value) if isinstance(value, dict) else enumerate(value)
            waiting += [((place, key), item) for key, item in items]
    if sum(storages.values()) > size:
        return f"{sum(storages.values())} bytes of tensors are claimed by a file of {size}"
    return None


def name_of(place):
    """The keys that lead to a value, a few of them if there are many, for a sentence.

    `place` is (place of what holds the value, its key), () for the content of the file.
    """
    keys = []
    while place:
        place, key = place
        keys.append(brief(str(key)))
    keys.reverse()
    if len(keys) > SHOWN:
        keys[SHOWN - 1 : -1] = ["..."]
    return ".".join(keys) or "the content"


def odd_tensor(value):
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return f"a {str(value.layout).removeprefix('torch.')} or quantized tensor"
    if value.device.type != "cpu":
        return f"a tensor on {value.device}"
    if value.numel() > value.untyped_storage().nbytes() // value.element_size():
        return f"a tensor of shape {tuple(value.shape)} without so many numbers"
    return None

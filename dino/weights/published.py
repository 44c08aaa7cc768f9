# SPDX-License-Identifier: Apache-2.0
"""What the authors published: file names, and a download that is kept only if it is right."""

import hashlib
import http.client
import urllib.request
import uuid
from pathlib import Path

import torch

from dino.distributed import print0
from dino.errors import UserError
from dino.meters import progress_bar
from dino.weights.files import DamagedFile, read

PUBLISHED_URL = "https://dl.fbaipublicfiles.com/dino/"
# {(arch, patch size): name} of files name/name.pth. The patch size is None where the arch names it
# or has none.
PUBLISHED_BACKBONES = {
    ("vit_small", 16): "dino_deitsmall16_pretrain",
    ("vit_small", 8): "dino_deitsmall8_pretrain",
    ("vit_base", 16): "dino_vitbase16_pretrain",
    ("vit_base", 8): "dino_vitbase8_pretrain",
    ("xcit_small_12_p16", None): "dino_xcit_small_12_p16_pretrain",
    ("xcit_small_12_p8", None): "dino_xcit_small_12_p8_pretrain",
    ("xcit_medium_24_p16", None): "dino_xcit_medium_24_p16_pretrain",
    ("xcit_medium_24_p8", None): "dino_xcit_medium_24_p8_pretrain",
    ("resnet50", None): "dino_resnet50_pretrain",
}
# With the 300-epoch ViT-S/8 of the paper's attention maps (Fig. 1 and 3) for the 800-epoch one.
PUBLISHED_FOR_PICTURES = {
    **PUBLISHED_BACKBONES,
    ("vit_small", 8): "dino_deitsmall8_300ep_pretrain",
}
# Trained on Google Landmarks v2, for retrieval (Table 3).
PUBLISHED_ON_LANDMARKS = {("vit_small", 16): "dino_vitsmall16_googlelandmark_pretrain"}
# Linear heads on PUBLISHED_BACKBONES: file, and the flags of eval_linear.py with which they were
# trained, those of ViT-S and of ViT-B.
SMALL = dict(n_last_blocks=4, avgpool_patchtokens=False)
BASE = dict(n_last_blocks=1, avgpool_patchtokens=True)
PUBLISHED_HEADS = {
    ("vit_small", 16): ("dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth", SMALL),
    ("vit_small", 8): ("dino_deitsmall8_pretrain/dino_deitsmall8_linearweights.pth", SMALL),
    ("vit_base", 16): ("dino_vitbase16_pretrain/dino_vitbase16_linearweights.pth", BASE),
    ("vit_base", 8): ("dino_vitbase8_pretrain/dino_vitbase8_linearweights.pth", BASE),
    ("resnet50", None): ("dino_resnet50_pretrain/dino_resnet50_linearweights.pth", {}),
}
# The authors publish no hashes. This one, of the only file for which several others do (343242485
# bytes), is the same wherever it is given.
SHA256 = {
    "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth": (
        "bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e"
    ),
}
CHUNK, PATIENCE = 2**20, 60  # bytes of a download at a time; seconds without any


def published_entry(table, arch, patch_size):
    """The entry of one of the tables above, or None."""
    return table.get((arch, patch_size)) or table.get((arch, None))


def download(file, why, check):
    """The content of a file that the authors published, which torch.hub's folder keeps.

    `why` it is needed goes into errors; `check` raises UserError for content that does not fit. A
    download gets its name only when all of that is known to be right.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(file).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{why}, but {path.parent}, which is to keep them, cannot be made"
                f" ({error.strerror}). Set TORCH_HOME to a folder that can be written to."
            ) from None
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of this process alone
        try:
            fetch(PUBLISHED_URL + file, temporary, why, SHA256.get(file), check)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    try:
        return read(path, f"{why}:")
    except DamagedFile as error:
        raise UserError(f"{error} Delete it, and it is downloaded again.") from None


def fetch(url, path, why, sha256, check):
    """Write what `url` holds to `path`. UserError unless that is whole and what it should be."""
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as sent, path.open("wb") as file:
            length = int(sent.headers.get("Content-Length", 0))
            chunks = iter(lambda: sent.read(CHUNK), b"")
            for chunk in progress_bar(chunks, path.name, -(-length // CHUNK) or None):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{why}, but {url} could not be downloaded ({error}).") from None
    if length and size != length:
        raise UserError(f"{why}, but of {url} only {size} of {length} bytes came. Try again.")
    if sha256 and digest.hexdigest() != sha256:
        raise UserError(f"{why}, but {url} has the SHA-256 {digest.hexdigest()}, not {sha256}.")
    try:
        content = read(path, f"what {url} sent, in")
    except DamagedFile:
        raise UserError(
            f"{why}, but {url} did not send a checkpoint: it begins with {path.read_bytes()[:20]}."
            " Is there a proxy with a page of its own? Download it by other means, and give the"
            " file with --pretrained_weights or --classifier."
        ) from None
    check(content)
    print0(f"Downloaded {url}: {size} bytes, SHA-256 {digest.hexdigest()}.")

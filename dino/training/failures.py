# SPDX-License-Identifier: Apache-2.0
"""What a failed run tells its user: what is saved, and what to try."""

import contextlib
from pathlib import Path

import torch

from dino.distributed import get_world_size
from dino.errors import Diverged, LostRank
from dino.precision import choose_amp_dtype
from dino.pulse import lost_ranks
from dino.training.saver import NEWEST

PRECISION_TO_TRY = {
    torch.float16: "--amp_dtype bfloat16 or, slower, float32, ",
    torch.bfloat16: "--amp_dtype float32, ",
    torch.float32: "",
}


@contextlib.contextmanager
def divergence_explained(args):
    """Add to a Diverged what is saved and what to try. `args` as they are when the steps begin."""
    try:
        yield
    except Diverged as error:
        raise explain_divergence(error, args) from None


@contextlib.contextmanager
def lost_ranks_explained():
    """Turn an error that a lost rank caused into a paragraph of advice."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_ranks() if get_world_size() > 1 else []
        if not lost:
            raise
        raise LostRank(
            f"lost contact with rank {', '.join(map(str, lost))}; stopping. See that rank's log, or"
            " the system log if it was killed. Run the same command to resume from the last"
            f" checkpoint. ({str(error).splitlines()[0]})"
        ) from None


def explain_divergence(error, args):
    """The error, with what is saved and what to try."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    precision = PRECISION_TO_TRY[choose_amp_dtype(args.amp_dtype, device, args.use_fp16)]
    saved = Path(args.output_dir) / NEWEST
    kept = f"{saved} is from before that" if saved.exists() else "nothing is saved yet"
    return Diverged(
        f"{error} (--lr {args.lr:g} for 256 images); {kept}. Try {precision}a lower --lr, a lower"
        " --clip_grad such as 0.3, a lower --teacher_temp, --min_lr or --weight_decay."
    )

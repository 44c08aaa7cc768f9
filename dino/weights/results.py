# SPDX-License-Identifier: Apache-2.0
"""Results in a folder of a run: another run must not replace them, nor a resumed one miss them."""

from pathlib import Path

from dino.errors import UserError


def check_no_results(folder, names, newest):
    """Raise UserError for a file of these `names`, which may hold *, that a new run would replace.

    For a `folder` without a checkpoint, such as `newest`. An empty file is nothing to lose.
    """
    found = [path for name in names for path in Path(folder).glob(name) if path.is_file()]
    results = [path.name for path in found if path.stat().st_size]
    if results:
        raise UserError(
            f"--output_dir {folder}: holds {results[0]}, which would be lost, and no {newest} to"
            " resume from. Give another folder, or move the file away."
        )


def is_beginning(path, checkpoint, best):
    """Whether the `checkpoint` at `path` has no progress, nor a file named `best` beside it.

    A run that diverged at once leaves one, and may begin again with other flags.
    """
    if not isinstance(checkpoint, dict):
        return False
    done = [checkpoint.get(name, 0) for name in ("epoch", "steps")]
    accuracy = checkpoint.get("best_acc")
    plain = all(type(value) is int for value in done) and type(accuracy) is float
    return plain and not any(done) and accuracy == -1 and not path.with_name(best).exists()


def check_has_best(path, name, epoch):
    """Raise UserError unless the file `name`, of the best `epoch`, is beside the checkpoint `path`.

    A run that resumes could not write it again.
    """
    if not path.with_name(name).exists():
        raise UserError(
            f"--output_dir {path}: {name} is not beside it, which that run wrote after epoch"
            f" {epoch}. Restore it; or give another --output_dir to train anew."
        )

# SPDX-License-Identifier: Apache-2.0
"""The flags of main_dino.py that change the method, for the paper's ablations (ablations.py)."""

from dino.ablations import LOSSES, TEACHER_UPDATES
from dino.command_line import bool_flag, number


def add_ablation_arguments(group):
    add = group.add_argument
    add(
        "--teacher_update",
        default="ema",
        choices=TEACHER_UPDATES,
        help="what the teacher is: the moving average of the student, or the student itself as of"
        " the last epoch, the last iteration or now (Fig. 6), without --momentum_teacher",
    )
    add(
        "--momentum_teacher_end",
        default=1.0,
        type=number(float, 0, 1),
        help="momentum of the moving average at the end; that of the start for a constant one",
    )
    add(
        "--center_momentum",
        default=0.9,
        type=number(float, 0, 1),
        help="momentum of the center; 1 keeps it at 0, which is no centering (Fig. 7). To take"
        " sharpening away, raise both teacher temperatures to 0.1, the student's, or above",
    )
    add(
        "--sinkhorn_iterations",
        default=0,
        type=number(int, 0, 100),
        help="iterations of Sinkhorn-Knopp, in place of the center (Table 7): 3 as in SwAV, 1 for a"
        " softmax over the batch, 0 for none; with --accum_steps it sees the parts",
    )
    add(
        "--loss",
        default="cross_entropy",
        choices=LOSSES,
        help="mse for the squared error of the probabilities (Table 7)",
    )
    add(
        "--predictor",
        default=False,
        type=bool_flag,
        help="a predictor in the student's head, as in BYOL (Table 7)",
    )

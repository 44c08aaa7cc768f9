# SPDX-License-Identifier: Apache-2.0
"""The names that code written for the official repository imports from `utils`.

Nothing is defined here, and nothing in `dino/` imports this file.
"""

from dino.backbones import has_batchnorms
from dino.command_line import bool_flag
from dino.distributed import get_rank, get_world_size, is_main_process
from dino.evaluation.copy_detection import PCA
from dino.evaluation.linear_files import load_pretrained_linear_weights
from dino.evaluation.retrieval import compute_ap, compute_map, multi_scale
from dino.meters import MetricLogger, SmoothedValue, accuracy
from dino.networks import MultiCropWrapper
from dino.official_helpers import (
    GaussianBlur,
    Solarization,
    get_sha,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    reduce_dict,
    save_on_master,
    setup_for_distributed,
)
from dino.optim import (
    LARS,
    cancel_gradients_last_layer,
    clip_gradients,
    cosine_scheduler,
    get_params_groups,
)
from dino.randomness import fix_random_seeds
from dino.training.checkpoint import restart_from_checkpoint
from dino.weights.pretrained import load_pretrained_weights
from vision_transformer import trunc_normal_

__all__ = [
    "LARS",
    "PCA",
    "GaussianBlur",
    "MetricLogger",
    "MultiCropWrapper",
    "SmoothedValue",
    "Solarization",
    "accuracy",
    "bool_flag",
    "cancel_gradients_last_layer",
    "clip_gradients",
    "compute_ap",
    "compute_map",
    "cosine_scheduler",
    "fix_random_seeds",
    "get_params_groups",
    "get_rank",
    "get_sha",
    "get_world_size",
    "has_batchnorms",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_pretrained_linear_weights",
    "load_pretrained_weights",
    "multi_scale",
    "reduce_dict",
    "restart_from_checkpoint",
    "save_on_master",
    "setup_for_distributed",
    "trunc_normal_",
]

# SPDX-License-Identifier: Apache-2.0
"""Seeds, and the states of the generators from which stochastic depth and dropout draw.

Views of images draw from generators of their own: see data.augmentations.
"""

import random

import numpy as np
import torch


def fix_random_seeds(seed=31):
    """Seed torch on every device, numpy and, unlike the official function, Python's random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state():
    """States of this process's torch generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    """Undo everything drawn since `random_state` gave this state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])

# SPDX-License-Identifier: Apache-2.0
"""From gradients to weights: schedules, parameter groups, clipping, frozen last layer, LARS."""

import numpy as np
import torch


def cosine_scheduler(
    base_value, final_value, epochs, niter_per_ep, warmup_epochs=0, start_warmup_value=0
):
    """A value per iteration: linear warm-up to `base_value`, half a cosine to `final_value`.

    An array of `epochs` * `niter_per_ep` values. ValueError for a warm-up longer than the run.
    As in the official code, the base value comes twice (last of the warm-up, first of the cosine),
    and the final one would come one iteration after the end.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs}")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    iterations = np.arange((epochs - warmup_epochs) * niter_per_ep)
    progress = iterations / max(1, len(iterations))
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate([warmup, cosine])


def get_params_groups(model):
    """Two groups of trainable parameters: the first with weight decay, the second without.

    Biases and all other parameters with one dimension have none; [CLS], the position embeddings
    and the head's last layer are decayed, as in the official code.
    """
    decayed, free = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (free if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


def build_optimizer(name, params_groups):
    """AdamW, SGD or LARS; learning rate and weight decay are set at every step.

    SGD is not fused: torch's fails where a parameter, such as the frozen last layer, has no
    momentum yet. Before a step that is not fused a GradScaler waits for the device.
    """
    if name == "adamw":
        return torch.optim.AdamW(params_groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params_groups, lr=0, momentum=0.9)
    return LARS(params_groups)


def set_lr_and_weight_decay(optimizer, lr, weight_decay):
    """Set lr on all groups of get_params_groups, weight decay on the first: the second has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(model, clip):
    """Scale each gradient *tensor* down to norm `clip`, unless that is 0; return the norms before.

    Not the norm of all gradients together: the official code clips tensor by tensor, which is part
    of the recipe. The norms, one 0-d tensor each, stay on the device.
    """
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norms = torch._foreach_norm(grads)
    if clip:
        coefficients = (clip / (torch.stack(norms) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(grads, list(coefficients.unbind()))
    return norms


def cancel_gradients_last_layer(epoch, model, freeze_last_layer):
    """Drop the last layer's gradients in the first `freeze_last_layer` epochs: no step for it."""
    if epoch >= freeze_last_layer:
        return
    for name, param in model.named_parameters():
        if "last_layer" in name:
            param.grad = None


def cancel_gradients_backbone(epoch, model, freeze_backbone):
    """Drop the backbone's gradients in the first `freeze_backbone` epochs: no step for it."""
    if epoch >= freeze_backbone:
        return
    for name, param in model.named_parameters():
        if name.removeprefix("module.").startswith("backbone."):
            param.grad = None


class LARS(torch.optim.Optimizer):
    """SGD with momentum, its step scaled layer by layer by eta |w| / |gradient + decay|.

    (You et al. 2017.) Neither that scale nor weight decay touches parameters with one dimension.
    The two filters are kept in the parameter groups and change nothing, as in the official code.
    """

    def __init__(
        self,
        params,
        lr=0,
        weight_decay=0.0,
        momentum=0.9,
        eta=0.001,
        weight_decay_filter=None,
        lars_adaptation_filter=None,
    ):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta)
        filters = dict(
            weight_decay_filter=weight_decay_filter, lars_adaptation_filter=lars_adaptation_filter
        )
        super().__init__(params, defaults | filters)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim != 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    param_norm, update_norm = param.norm(), update.norm()
                    trust = group["eta"] * param_norm / update_norm
                    # 1 where either norm is 0, chosen on the device: an `if` would wait for it
                    trust = torch.where(
                        (param_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust)
                    )
                    update = update * trust
                state = self.state[param]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(param)
                buffer = state["mu"]
                buffer.mul_(group["momentum"]).add_(update)
                param.add_(buffer, alpha=-group["lr"])

# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which type, and the autocast context of it."""

import torch

AMP_DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_amp_dtype(amp_dtype, device, use_fp16=True):
    """torch dtype of autocast on `device`; float32 means none.

    `auto`: bfloat16 where the GPU computes in it, else float16, which needs a GradScaler; float32
    on a CPU.
    """
    if not use_fp16 or amp_dtype == "float32":
        return torch.float32
    if amp_dtype != "auto":
        return getattr(torch, amp_dtype)
    if device.type != "cuda":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def has_fast_bfloat16():
    """Whether this CPU has instructions for it; without them it is slower than float32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(device, dtype):
    """torch.autocast in `dtype`, which does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

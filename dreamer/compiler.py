"""How XLA is told to compile an update."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax

from dreamer.kernels import Target

#: How XLA compiles an update, by kind of device, where its defaults are not the best.
OPTIONS: dict[str, dict[str, Any]] = {
    # The defaults hand every sum to a library, so the arithmetic around it cannot be fused, and use only half the width
    # of wide vector units.
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_prefer_vector_width": 512,
    },
    # Devices add up gradients while they compute.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


@functools.cache
def options(target: Target) -> dict[str, Any] | None:
    """How XLA should compile an update; None (its defaults) where it does not know these options, where XLA_FLAGS
    already sets options for this kind of device, and for plain programs.
    """
    kind = target.platform
    found = OPTIONS.get(kind) if target.rewrites else None
    if found is None or f"--xla_{kind}_" in os.environ.get("XLA_FLAGS", ""):
        return None
    try:
        jax.jit(lambda x: x, compiler_options=found).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return dict(found)

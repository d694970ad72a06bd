"""How XLA is told to compile an update."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax

#: How XLA compiles an update, by kind of device, where its defaults are not the best.
OPTIONS: dict[str, dict[str, Any]] = {
    # The defaults hand every sum to a library, which keeps the arithmetic around it from being fused, and use half the
    # width of wide vector units.
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_prefer_vector_width": 512,
        # Temporary memory in blocks that fit into every arena of the C library, which keeps them (runtime/allocator).
        "xla_multiheap_size_constraint_per_heap": 56 * 2**20,
    },
    # Devices add up gradients while they compute.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


@functools.cache
def options() -> dict[str, Any] | None:
    """How XLA should compile an update on this machine; None (its defaults) where it does not know these options, or
    where XLA_FLAGS has some of its own for this kind of device.
    """
    kind = jax.default_backend()
    found = OPTIONS.get(kind)
    if found is None or f"--xla_{kind}_" in os.environ.get("XLA_FLAGS", ""):
        return None
    if kind == "cpu" and "JAX_LOGGING_LEVEL" not in os.environ and os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        # XLA warns of every array that is larger than such a block. (JAX itself sets the level 1.)
        jax.config.update("jax_logging_level", "ERROR")
    try:
        jax.jit(lambda x: x, compiler_options=found).lower(0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return dict(found)

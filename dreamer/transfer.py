"""The only way by which the numbers of the training loop leave the device."""

from __future__ import annotations

from typing import Any

import jax

from dreamer.sharding import own_share


def begin(tree: Any) -> None:
    """Start transferring the arrays of a tree that will be read soon, each as soon as it is computed; never waits."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()


def read(tree: Any) -> Any:
    """The tree with its arrays on the host, numpy; waits for what is still being computed. Of arrays divided over
    processes, the share of this one.

    All transfers begin before the first is waited for: whatever is needed at the same time belongs in one read. The
    loop has one for each step of the environments (`Run`), and one for each further dispatch that is due in that step.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    begin(tree)
    return own_share(tree)

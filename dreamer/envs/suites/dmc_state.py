"""The state of a DeepMind Control environment, complete to the bit.

Four parts: the physics (MuJoCo's integration state, warm start of the constraint solver included), what the task has
changed in the model at the start of the episode (targets, terrain, gains), the task's own attributes with its random
stream, and the environment's step count. Everything else in MuJoCo's data is a function of these.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

#: Beginnings of the names of model arrays that are large and that no task changes: geometry, textures, texts.
FIXED = ("mesh_", "tex_", "skin_", "flex", "bvh_", "oct_", "name", "text_", "paths", "plugin")


def model_arrays(physics: Any) -> dict[str, np.ndarray]:
    """Views of the arrays of the model that a task may write to."""
    model = physics.model
    names = (name for name in dir(model) if not name.startswith(("_", *FIXED)))
    found = {name: getattr(model, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


class StateOf:
    """Saves and restores one environment of `dm_control.suite`; make it before the first episode."""

    def __init__(self, env: Any) -> None:
        import mujoco

        self._env = env
        self._signature = int(mujoco.mjtState.mjSTATE_INTEGRATION)
        # The loaded model, equal in all environments of a task: a state holds only what differs from it.
        self._original = {name: array.copy() for name, array in model_arrays(env.physics).items()}

    def get(self) -> dict[str, Any]:
        env = self._env
        changed = {
            name: array.copy()
            for name, array in model_arrays(env.physics).items()
            if not np.array_equal(array, self._original[name])
        }
        return {
            "physics": env.physics.get_state(self._signature),
            "model": changed,
            "task": copy.deepcopy(vars(env.task)),
            "step_count": env._step_count,
            "reset_next_step": env._reset_next_step,
        }

    def set(self, state: dict[str, Any]) -> None:
        import mujoco

        env, physics = self._env, self._env.physics
        for name, array in model_arrays(physics).items():
            array[...] = state["model"].get(name, self._original[name])
        vars(env.task).clear()
        vars(env.task).update(copy.deepcopy(state["task"]))
        physics.set_state(state["physics"], self._signature)
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)  # poses, contacts and sensors from positions and speeds
        # Normalised quaternions and the like may have moved in the last bit.
        physics.set_state(state["physics"], self._signature)
        env._step_count = state["step_count"]
        env._reset_next_step = state["reset_next_step"]
        self._show_terrain()

    def _show_terrain(self) -> None:
        """The graphics card has its own copy of height fields."""
        import mujoco

        physics = self._env.physics
        if physics.model.nhfield == 0 or physics._contexts is None:
            return
        with physics._contexts.gl.make_current() as graphics:
            for index in range(physics.model.nhfield):
                graphics.call(mujoco.mjr_uploadHField, physics.model.ptr, physics._contexts.mujoco.ptr, index)

"""DeepMind Control: state vectors or pixels. A task is ``domain_task``, such as ``cartpole_swingup``.

Pixels need OpenGL without a screen. If MUJOCO_GL is unset it becomes ``egl`` or ``osmesa``, whichever library the
system has. Debian packages: libegl1 libgl1 libgl1-mesa-dri (egl) or libosmesa6 (osmesa).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from typing import Any

import numpy as np

from dreamer.env_config import DmcConfig, EnvConfig
from dreamer.envs.interface import TaskError, Transition, transition
from dreamer.envs.spaces import rescale
from dreamer.types import Space

#: Tasks by domain. dm_control's lqr is not here: its actions are unbounded.
TASKS: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
NAMES = {f"{domain}_{task}": (domain, task) for domain, names in TASKS.items() for task in names}
CAMERAS = {"quadruped": 2}
NO_RENDERER = (
    "could not render DeepMind Control with MUJOCO_GL={backend} ({cause}). Install a headless OpenGL, on Debian and "
    "Ubuntu `apt-get install libegl1 libgl1 libgl1-mesa-dri` (MUJOCO_GL=egl) or `apt-get install libosmesa6` "
    "(MUJOCO_GL=osmesa); or observe the state: --env.dmc.pixels false"
)


class DeepMindControl:
    """One task. Episodes end at a time limit, and as terminal where the discount of the task is 0."""

    def __init__(self, name: str, config: DmcConfig, seed: int) -> None:
        suite = _load_suite(config.pixels)
        domain, task = NAMES[name]
        self._env = suite.load(domain, task, task_kwargs={"random": seed})
        self._state = StateOf(self._env)
        self._config = config
        self._camera_id = CAMERAS.get(domain, 0) if config.camera is None else config.camera
        self._camera: Any = None
        self._renders = True
        self._bounds = self._env.action_spec()
        self.action_spaces = {"action": Space("vector", self._bounds.shape)}
        if config.pixels:
            self.observation_spaces = {"image": Space("image", (*config.size, 3))}
            self._try_renderer()
        else:
            specs = self._env.observation_spec()
            self.observation_spaces = {key: Space("vector", spec.shape or (1,)) for key, spec in specs.items()}

    def reset(self) -> Transition:
        time_step = self._env.reset()
        self._camera = None  # a task may have built a new scene
        return transition(self._observation(time_step), is_first=True)

    def step(self, action: Mapping[str, np.ndarray]) -> Transition:
        control = rescale(action["action"], self._bounds.minimum, self._bounds.maximum)
        reward = 0.0
        for _ in range(self._config.repeat):
            time_step = self._env.step(control)
            reward += time_step.reward
            if time_step.last():
                break
        terminal = time_step.last() and time_step.discount == 0
        return transition(self._observation(time_step), reward, is_last=time_step.last(), is_terminal=terminal)

    def get_state(self) -> dict[str, Any]:
        return self._state.get()

    def set_state(self, state: dict[str, Any]) -> None:
        self._state.set(state)

    def render(self) -> np.ndarray | None:
        """The camera's picture; None where state is observed and this machine cannot render."""
        if not self._renders:
            return None
        try:
            return self._image()
        except Exception:  # whatever the graphics driver raises; the state does not need it
            if self._config.pixels:
                raise
            self._renders = False
            return None

    def close(self) -> None:
        self._camera = None
        self._env.close()

    def _observation(self, time_step: Any) -> dict[str, np.ndarray]:
        if self._config.pixels:
            return {"image": self._image()}
        values = time_step.observation
        return {
            key: np.array(values[key], np.float32).reshape(space.shape)
            for key, space in self.observation_spaces.items()
        }

    def _image(self) -> np.ndarray:
        """uint8 (H, W, 3). One camera serves a whole episode: making one costs as much as a picture."""
        if self._camera is None:
            from dm_control.mujoco.engine import Camera

            height, width = self._config.size
            self._camera = Camera(self._env.physics, height, width, self._camera_id)
        return self._camera.render().copy()

    def _try_renderer(self) -> None:
        try:
            self._image()
        except Exception as error:  # drivers raise many kinds
            backend = os.environ.get("MUJOCO_GL")
            raise TaskError(NO_RENDERER.format(backend=backend, cause=error)) from error


def _load_suite(pixels: bool) -> Any:
    """dm_control.suite, whose first import fixes the renderer for the process."""
    chosen = "MUJOCO_GL" in os.environ or "dm_control" in sys.modules or not sys.platform.startswith("linux")
    if not chosen:
        found = [backend for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)]
        os.environ["MUJOCO_GL"] = found[0] if found else "disabled"
    try:
        from dm_control import suite
    except Exception as error:  # a library that exists but does not start
        if pixels or chosen:
            raise TaskError(NO_RENDERER.format(backend=os.environ.get("MUJOCO_GL"), cause=error)) from error
        os.environ["MUJOCO_GL"] = "disabled"
        from dm_control import suite
    return suite


def make(name: str, config: EnvConfig, seed: int) -> DeepMindControl:
    return DeepMindControl(name, config.dmc, seed)


def tasks() -> Sequence[str]:
    return tuple(NAMES)


# --- State -----------------------------------------------------------------------------------------
#
# Complete to the bit, in four parts: the physics (MuJoCo's integration state, warm start of the constraint solver
# included), what the task changed in the model at the start of the episode (targets, terrain, gains), the task's
# own attributes with its random stream, and the environment's step count. All else in MuJoCo's data follows from these.


#: Prefixes of the names of large model arrays that no task changes: geometry, textures, texts.
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

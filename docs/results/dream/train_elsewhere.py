"""Trains an agent of another library, stable-baselines3's PPO, in the dream of a run of catch, and plays the real game.

python docs/results/dream/train_elsewhere.py LOGDIR SEED [STEPS] prints one line of JSON: mean scores in the dream and
in the real game, of 100 episodes each with the most likely actions, and the exploit gap, dream minus real. Needs the
extra `sb3`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from dreamer.envs import best_score, make_env
from dreamer.presets import run_config

DREAM = "dreamer.dream_env:Dream-v0"
EPISODES = 100
#: Seed of the episodes that are scored; training uses the seeds from the given one on.
SCORED = 10_000


def train(logdir: str, seed: int, steps: int) -> PPO:
    """Trained on dreams alone: no step of the real game."""
    envs = make_vec_env(DREAM, n_envs=4, seed=seed, env_kwargs={"logdir": logdir})
    options: dict[str, Any] = {"n_steps": 256, "batch_size": 256, "n_epochs": 6, "learning_rate": 7e-4}
    options |= {"gamma": 0.95, "ent_coef": 0.01, "policy_kwargs": {"net_arch": [128, 128]}}
    return PPO("MlpPolicy", envs, seed=seed, device="cpu", **options).learn(steps)


def dream_scores(model: PPO, logdir: str) -> list[float]:
    env, scores = gymnasium.make(DREAM, logdir=logdir), []
    for episode in range(EPISODES):
        seen, over, score = env.reset(seed=SCORED + episode)[0], False, 0.0
        while not over:
            seen, reward, ended, cut, _ = env.step(model.predict(seen, deterministic=True)[0])
            score, over = score + float(reward), ended or cut
        scores.append(score)
    return scores


def real_scores(model: PPO, logdir: str) -> list[float]:
    config = run_config(logdir)
    env, scores = make_env(config.task, config.env, SCORED), []
    for _ in range(EPISODES):
        step, score = env.reset(), 0.0
        while not step["is_last"]:
            step = env.step({"action": model.predict(step["image"], deterministic=True)[0]})
            score += float(step["reward"])
        scores.append(score)
    return scores


def main(logdir: str, seed: int = 0, steps: int = 60_000) -> dict[str, float]:
    torch.set_num_threads(1)
    model = train(logdir, seed, steps)
    found: dict[str, float] = {"seed": seed, "steps": model.num_timesteps}
    for name, scores in (("dream", dream_scores(model, logdir)), ("real", real_scores(model, logdir))):
        found |= {name: float(np.mean(scores)), f"{name}_error": float(np.std(scores) / len(scores) ** 0.5)}
    config = run_config(logdir)
    return found | {"gap": found["dream"] - found["real"], "best": best_score(config.task, config.env) or np.nan}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))

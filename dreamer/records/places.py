"""Where the records of a run go, from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamer.config import Config
from dreamer.presets import value_of
from dreamer.records.logger import Logger
from dreamer.records.pictures import Pace
from dreamer.records.sink import Sink
from dreamer.records.tensorboard import TensorBoardSink
from dreamer.records.trackers import MlflowSink, WandbSink
from dreamer.schema import options, show

#: Options that say nothing about how a run learns.
_BESIDE = ("log.", "logdir", "run.display")


def make_logger(config: Config) -> Logger:
    """The logger of a run, with all sinks that the options ask for."""
    log, folder, steps = config.log, Path(config.logdir), config.run.agent_steps
    sinks: list[Sink] = []
    if log.tensorboard:
        pace = Pace(log.tensorboard_megabytes, steps)
        sinks.append(TensorBoardSink(folder / "tensorboard", changed(config), as_text(config), pace))
    if log.wandb is not None:
        sinks.append(WandbSink(folder, log.wandb, table(config)))
    if log.mlflow is not None:
        sinks.append(MlflowSink(folder, log.mlflow, table(config)))
    return Logger(folder, log.jsonl, log.video_fps, sinks, Pace(log.picture_megabytes, steps))


def table(config: Config) -> dict[str, float | str]:
    """Options by name, as numbers where they are numbers, for comparing runs."""

    def plain(value: Any) -> float | str:
        return value if isinstance(value, int | float) else show(value)

    return {name: plain(value_of(config, name)) for name in options() if not name.startswith(_BESIDE)}


def changed(config: Config) -> dict[str, float | str]:
    """Those of the table that are not at their defaults, and which run it is."""
    default = {option.name: option.default for option in options().values()}
    told = ("task", "seed")
    return {name: v for name, v in table(config).items() if name in told or value_of(config, name) != default[name]}


def as_text(config: Config) -> str:
    """All options, Markdown: those that differ from their defaults first."""
    given = {name: (show(value_of(config, name)), show(option.default)) for name, option in options().items()}
    changed = [f"| `{name}` | {_code(now)} | `{default}` |" for name, (now, default) in given.items() if now != default]
    rest = [f"| `{name}` | {_code(now)} |" for name, (now, default) in given.items() if now == default]
    return "\n".join(
        ["| changed option | value | default |", "| --- | --- | --- |", *changed, ""]
        + ["| option at its default | value |", "| --- | --- |", *rest]
    )


def _code(text: str) -> str:
    """A span of code in a cell: neither its backticks nor its lines end it."""
    line = " ".join(text.splitlines())
    return f"`` {line} ``" if "`" in line else f"`{line}`"

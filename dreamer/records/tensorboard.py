"""TensorBoard: scalars in groups, pictures, the options of the run, and a page of charts about its health."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary as make
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from dreamer.records.pictures import Pace, Picture
from dreamer.records.sink import Appender, Steps

#: Events are written at a flush, and whenever this many bytes are waiting.
_FLUSHED_BYTES = 1 << 20

#: How names become tags: the first pattern that matches the beginning of a name is replaced by a group. The viewer
#: sorts groups by name and opens the first two: those that say whether the run learns.
GROUPS: tuple[tuple[str, str], ...] = (
    (r"(?=(episode|eval)/(.+/(mean|max)|(mean_)?length)$)", "4_behaviour/"),
    (r"(?=(episode|eval)/)", "1_score/"),
    (r"report/(?=(seen|calibration)_error/|bias/(reward|cont)$|latent_(entropy|spread)$)", "3_world_model/"),
    (r"report/(?=param_norm/)", "5_optimizer/"),
    (r"report/", "2_health/"),
    (r"train/(?=loss/(policy|value|repval)$)", "4_behaviour/"),
    (r"train/(?=loss/|(dyn|rep)_ent$)", "3_world_model/"),
    (r"train/opt/", "5_optimizer/"),
    (r"train/", "4_behaviour/"),
    (r"replay/", "6_replay/"),
    (r"(?=(fps|time)/)", "7_speed/"),
    (r"system/|(?=env/)", "8_system/"),
    (r"", "9_other/"),
)

#: The charts under "Custom scalars": title -> patterns of tags.
CHARTS: dict[str, list[str]] = {
    "score": ["1_score/episode/mean_score$", "1_score/eval/score$"],
    "return of the policy: imagined and real": ["2_health/(imagined|real)_return$"],
    "error of imagined observations": ["2_health/imagined_error/"],
    "KL of posterior and prior, nats": ["2_health/kl$", "3_world_model/loss/dyn$"],
    "latents: share of classes that are dead": ["2_health/latent_dead$"],
    "bias of predictions": ["(2_health|3_world_model)/bias/"],
    "losses of the world model": ["3_world_model/loss/"],
    "entropy of the policy, nats": ["4_behaviour/ent/"],
    "values: imagined return and critic": ["4_behaviour/(tar|val|slowval)$"],
    "norms of gradients": ["5_optimizer/(module_)?grad_norm"],
    "replayed steps per step": ["6_replay/ratio$"],
    "where the time goes": ["7_speed/time/"],
}


def tag(name: str) -> str:
    """The tag of a metric or a picture: `train/opt/loss` -> `5_optimizer/loss`."""
    for pattern, group in GROUPS:
        if found := re.match(pattern, name):
            return group + name[found.end() :]
    raise AssertionError("the last pattern matches everything")


class TensorBoardSink:
    """Event files, written in the caller's thread: no queue that could block when the disk is full.

    tensorboardX's own video summary silently needs moviepy, so videos are image summaries that hold a GIF.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, float | str] | None = None,
        text: str | None = None,
        scalars: Pace | None = None,
    ) -> None:
        """options: for the table of hyper-parameters; text: all, as Markdown; scalars: the space for numbers."""
        self._folder, self._options, self._text = folder, dict(options or {}), text
        self._file: Appender | None = None
        self._purge_step: int | None = None
        self._pace = scalars or Pace(None, 1)

    def scalars(self, steps: Steps, values: Mapping[str, float | int]) -> None:
        summaries = [summary_pb2.Summary.Value(tag=tag(name), simple_value=value) for name, value in values.items()]
        summary = summary_pb2.Summary(value=summaries)
        if self._pace.takes(summary.ByteSize() + 40, steps.agent_steps):
            self._write(steps, summary)

    def episode(self, steps: Steps, score: float, length: int) -> None:
        self.scalars(steps, {"episode/score": score, "episode/length": length})

    def picture(self, steps: Steps, name: str, picture: Picture) -> None:
        image = summary_pb2.Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=picture.data
        )
        self._write(steps, summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag(name), image=image)]))

    def offsets(self) -> dict[str, int]:
        return {"tensorboard": self._pace.spent}

    def truncate(self, offsets: Mapping[str, int], steps: Steps | None) -> None:
        self._pace.spent = offsets.get("tensorboard", 0)
        if steps is not None:
            self.close()
            self._purge_step = steps.env_frames + 1

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file = None

    def _write(self, steps: Steps, summary: Any) -> None:
        if self._file is None:
            self._file = self._open()
        self._put(self._file, steps.env_frames, summary=summary)
        if self._file.held_bytes > _FLUSHED_BYTES:
            self._file.flush()

    def _open(self) -> Appender:
        # The viewer reads files in the order of their names, and two may be opened within one second.
        number = len(list(self._folder.glob("events.out.tfevents.*")))
        file = Appender(self._folder / f"events.out.tfevents.{time.time():.0f}.{number:04d}.{socket.gethostname()}")
        self._put(file, 0, file_version="brain.Event:2")
        if self._purge_step is not None:
            self._put(file, self._purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        for summary in self._description():
            self._put(file, 0, summary=summary)
        return file

    def _description(self) -> list[Any]:
        """What every file begins with: charts and options. They are this run's: the viewer shows only one set."""
        charts = {title: ["Multiline", patterns] for title, patterns in CHARTS.items()}
        found = [make.custom_scalars({"health": charts})]
        if self._text is not None:
            found.append(make.text("options", self._text))
        if self._options:
            experiment, session, _ = make.hparams(self._options, {tag("episode/score"): 0.0, tag("eval/score"): 0.0})
            found += [experiment, session]
        return found

    @staticmethod
    def _put(file: Appender, step: int, **contents: Any) -> None:
        """One record: length, its checksum, event, its checksum (little endian)."""
        event = event_pb2.Event(wall_time=time.time(), step=int(step), **contents).SerializeToString()
        length = struct.pack("<Q", len(event))
        checks = (struct.pack("<I", masked_crc32c(data)) for data in (length, event))
        file.append(length + next(checks) + event + next(checks))

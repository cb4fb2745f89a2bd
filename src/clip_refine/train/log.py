"""The numbers of every step: log.jsonl and experiment trackers."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from clip_refine.config import RefineConfig
from clip_refine.results import Scores, flat
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError, DataError, foreign
from clip_refine.support.folder import write_file
from clip_refine.support.limits import WHOLE, read_text


class StepLog:
    """Appends records to a JSON Lines file, each on disk before the next step.

    Attributes:
        path: The file, None to write nothing (every process but the first).
        also: Receives every record, too.
    """

    def __init__(
        self,
        path: Path | None,
        also: Callable[[dict[str, float]], None] | None = None,
        *,
        earlier: Path | None = None,
        steps: int = 0,
    ) -> None:
        """Begin with the first `steps` lines of an `earlier` log, which may be this one."""
        self.path = path
        self.also = also
        lines: list[str] = []
        if earlier:
            with foreign(DataError, f"{earlier}: what this run goes on with cannot be read"):
                lines = read_text(earlier, WHOLE).splitlines(keepends=True)[:steps]
        if path:  # at once, since a run that is killed before its next step goes on once more
            write_file(path, "".join(lines))
        self._file = path.open("a", encoding="utf-8") if path else None

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, record: Mapping[str, float]) -> None:
        """Add one line."""
        try:
            if self._file:
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
        except OSError as error:  # a full disk ends no training
            remark(f"{self.path}: cannot be written any more ({error.strerror}).", "yellow")
            self._file = None
        if self.also:
            self.also(dict(record))

    def flush(self) -> None:
        """Have the disk keep every line so far."""
        if self._file:
            os.fsync(self._file.fileno())


PROJECT = "clip-refine"


class Tracking:
    """Numbers on their way to Accelerate's tracker, or nowhere."""

    def __init__(self, tracker: GeneralTracker | None) -> None:
        self.tracker = tracker

    def step(self, record: dict[str, float]) -> None:
        """The numbers of a training step."""
        if self.tracker:
            numbers = {f"train/{name}": value for name, value in record.items() if name != "step"}
            self.tracker.log(numbers, step=int(record["step"]))

    def scores(self, scores: Scores, *, step: int) -> None:
        """Held-out scores: at step 0 before, at the last step after."""
        if not self.tracker:
            return
        numbers = flat(scores.model_dump(include={"geometry", "retrieval", "zero_shot"}))
        # TensorBoard knows no @ in names
        named = {f"scores/{name.replace('@', '_at_')}": value for name, value in numbers.items()}
        self.tracker.log(named, step=step)


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is missing, before any work is done."""
    if name != "none" and find_spec(name) is None:
        raise ConfigError(
            f"log {name!r}: the package {name} is not installed. Run `pip install {name}`, or "
            "leave --log out; log.jsonl is written anyway."
        )


@contextmanager
def track_run(config: RefineConfig, folder: Path | None) -> Iterator[Tracking]:
    """Where the numbers of a run go besides its folder."""
    tracker: GeneralTracker | None = None
    if folder:
        match config.log:
            case "tensorboard":
                tracker = TensorBoardTracker("tensorboard", logging_dir=folder)
            case "wandb":
                tracker = WandBTracker(PROJECT, name=config.out.name)
            case "trackio":
                tracker = TrackioTracker(PROJECT, name=config.out.name)
    try:
        if tracker:
            tracker.start()
            settings = flat(config.model_dump(mode="json"))
            plain = {  # lists as text
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in settings.items()
            }
            tracker.store_init_configuration(plain)
        yield Tracking(tracker)
    finally:
        if tracker:
            tracker.finish()

"""States of a training on disk, from which it goes on as if nothing had happened.

`state/step-000000120` in a run's folder holds `state.safetensors` (weights, the optimiser's
moments, generators) and `state.json` (everything else), with checksums; the last two stay.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_refine.results import flat
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError, DataError, foreign, ran_out
from clip_refine.support.folder import WORK, check_sums, clear_left, readable, seal, sync
from clip_refine.support.limits import WHOLE, parse_json, read_text
from clip_refine.support.process import Stopped, stop_asked

KEPT = 2  # should a power cut spoil the last one
WORTH_SAVING = 60.0  # seconds of training behind the last state that the end saves once more
_SHARE = 0.02  # of training that saving may take before that is said


class _Decided(BaseModel):
    precision: str
    learning_rate: float | None = None


class _Form(BaseModel):
    """What `state.json` holds, whoever wrote it."""

    step: NonNegativeInt
    about: dict[str, Any]
    decided: _Decided
    micro_batch: PositiveInt | None
    first: dict[str, float]
    best: list[float] | None = Field(min_length=2, max_length=2)
    groups: list[dict[str, Any]]
    schedule: dict[str, Any]
    progress: Any


@dataclass(frozen=True)
class SavedState:
    """A state that is whole: `folder` with its `state.json`."""

    folder: Path
    plain: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.plain["step"]

    @property
    def log(self) -> Path:
        """The log of the run that saved it."""
        return self.folder.parents[1] / "log.jsonl"

    def tensors(self) -> dict[str, Tensor]:
        """Those of `Trainer.state`, on the CPU."""
        return load_file(self.folder / "state.safetensors")


def newest_state(run: Path) -> SavedState | None:
    """The last state in a run's folder whose checksums are right; None where there is none."""
    for folder in sorted((run / WORK).glob("step-*"), reverse=True):
        try:
            check_sums(folder)
            with foreign(DataError, "state.json is not what was written"):
                plain = parse_json(read_text(folder / "state.json", WHOLE))
                if plain.pop("sum") != _plain_sum(plain):
                    raise ValueError("its checksum is another")
                _Form.model_validate(plain, strict=True)
                return SavedState(folder, plain)
        except DataError as error:
            remark(f"{folder}: cannot be used ({error}).", "yellow")
    return None


@contextmanager
def fitting(saved: SavedState) -> Iterator[None]:
    """Around what goes on with a state: where it holds another run's things, say so."""
    after = " Leave --resume out to begin anew."
    full: BaseException | None = None
    with foreign(ConfigError, f"{saved.folder}: does not fit this run", after):
        try:
            yield
        except Exception as error:
            if not ran_out(error):
                raise
            full = error  # of a device in use: nothing is wrong with the state
    if full:
        raise full


def _plain_sum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_same(saved: SavedState, about: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings, another model or other pairs; say which."""
    was, now = flat(saved.plain["about"]), flat(json.loads(json.dumps(about)))
    for name in sorted({*was, *now}):
        if was.get(name) == now.get(name):
            continue
        if name in ("model", "pairs"):
            what = f"another {name} than now" if name == "model" else "other training pairs"
        else:
            what = f"{name} {was.get(name)!r}, now it is {now.get(name)!r}"
        raise ConfigError(
            f"{saved.folder}: was saved with {what}. A run goes on with what it began with; leave "
            "--resume out to begin anew."
        )


def tensor_sum(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of values, bit by bit."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass
class States:
    """When states are saved, where, and what they belong to."""

    folder: Path | None  # of the run; None on processes that write nothing
    every: str  # steps as "500", minutes as "10m", "never"
    about: Mapping[str, Any]  # what has to be the same for a run that goes on
    progress: Callable[[], Any] | None = None  # what a stream has read
    saved: SavedState | None = None  # where this run goes on
    decided: dict[str, Any] = field(default_factory=dict)  # measured once: precision, start
    _last: float = field(default_factory=time.perf_counter)
    _spent: float = 0.0

    @property
    def start(self) -> int:
        """Steps that were taken already."""
        return self.saved.step if self.saved else 0

    def decide(self, decided: Mapping[str, Any]) -> None:
        """Record what was found before the first step; say where it is not what it was."""
        self.decided = dict(decided)
        if self.saved is None:
            return
        plain = self.saved.plain
        # parts as they were when it was saved: memory may have been too little for those chosen
        was = {**plain["decided"], "micro_batch": plain.get("micro_batch")}
        for name, value in decided.items():
            if was.get(name) != value:
                what = "what was measured before" if name == "begin" else f"{name} {was.get(name)}"
                remark(
                    f"This run goes on, but not bit by bit: {what} then, another one now.", "yellow"
                )

    def after(self, step: int, steps: int, trainer: Any, flush: Callable[[], None]) -> None:
        """Save where it is time to, or where a signal came, which then stops the run."""
        since = time.perf_counter() - self._last
        at_end = step == steps and since > WORTH_SAVING
        due = self.every != "never" and (at_end or self._is_due(step, since))
        asked, due = trainer.agree(stop_asked(), int(due))
        kept = self._save(step, trainer, flush) if due or asked else ""
        if asked:
            raise Stopped(asked, f"step {step} of {steps} is {kept}")

    def _is_due(self, step: int, since: float) -> bool:
        if self.every.endswith("m"):
            return since >= 60 * float(self.every[:-1])
        return step % int(self.every) == 0

    def _save(self, step: int, trainer: Any, flush: Callable[[], None]) -> str:
        """What became of it, in words; training is worth more than a state, so it goes on."""
        begin = time.perf_counter()
        tensors, plain = trainer.state()
        plain["progress"] = self.progress and self.progress()  # every process has to ask
        done = "saved; --resume auto goes on from there"
        if self.folder is not None:
            try:
                flush()
                self._write(self.folder, step, tensors, plain)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                remark(f"{self.folder}: step {step} could not be saved ({reason}).", "yellow")
                done = "not saved"
        self._last = time.perf_counter()
        self._spent += self._last - begin
        return done

    def _write(
        self, run: Path, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]
    ) -> None:
        folder = run / WORK
        for left in folder.glob(".step-*"):  # its run is locked, so that nobody writes it
            clear_left(left)
        new, named = folder / f".step-{step:09}.partial", folder / f"step-{step:09}"
        new.mkdir(parents=True)
        try:
            with readable(new / "state.safetensors"):
                save_file(_apart(tensors), new / "state.safetensors")
            plain = {
                **plain,
                "step": step,
                "about": self.about,
                "decided": self.decided,
            }
            plain = json.loads(json.dumps(plain))
            (new / "state.json").write_text(json.dumps({**plain, "sum": _plain_sum(plain)}))
            seal(new)
            shutil.rmtree(named, ignore_errors=True)  # of a run that then went back
            new.rename(named)
            seal(folder)
            for above in (run, *run.parents):  # any of which may be new
                with suppress(OSError):  # of others
                    sync(above)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        last = [state for state in sorted(folder.glob("step-*")) if state <= named][-KEPT:]
        for state in folder.glob("step-*"):  # later ones could not be used
            if state not in last:
                shutil.rmtree(state)

    def say_cost(self, seconds: float) -> None:
        """Name the share of training that saving took, where it is worth a word."""
        if self._spent > _SHARE * seconds and self._spent > 1:
            remark(
                f"Saving states took {self._spent:.0f} of {seconds:.0f} s; a larger "
                "--train.save-every takes less."
            )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own as safetensors wants it."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen else own
        seen.add(place)
    return found

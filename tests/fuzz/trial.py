"""One changed file read: nothing but our own errors may happen, within 10 s of a processor."""

import signal
import traceback
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"
"""TARGET/NUMBER-FILE: changed files that went wrong once."""
LONGEST = 10
"""Seconds that one file may take of a processor; six times that by the clock, on a busy machine."""
_CLOCKS = {  # signal → what it is sent by, after how long
    signal.SIGPROF: (signal.ITIMER_PROF, LONGEST),
    signal.SIGALRM: (signal.ITIMER_REAL, 6 * LONGEST),
}


class _TooLongError(BaseException):
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError(f"longer than {LONGEST} s of a processor, or {6 * LONGEST} s")


def judged(target: Target, folder: Path, name: str, content: bytes) -> str | None:
    """Put a changed file in its place and read it: what went wrong, or None."""
    from clip_refine.support.errors import ClipRefineError

    path = folder / name
    sound = path.read_bytes()
    path.write_bytes(content)
    before = {number: signal.signal(number, _stop) for number in _CLOCKS}
    for clock, seconds in _CLOCKS.values():
        signal.setitimer(clock, seconds)
    try:
        target.read(folder, name)
    except ClipRefineError as error:
        return f"{len(str(error)):,} letters of message" if len(str(error)) > 20_000 else None
    except KeyboardInterrupt:
        raise
    except BaseException:  # also panics of parsers in Rust
        return traceback.format_exc()
    finally:
        for number, (clock, _) in _CLOCKS.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
        path.write_bytes(sound)
    return None

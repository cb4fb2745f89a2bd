"""One changed file read: what must not happen is anything but our own errors within 10 seconds."""

import signal
import traceback
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"
"""TARGET/NUMBER-FILE: changed files that went wrong once."""
LONGEST = 10
"""Seconds that one file may take."""


class _TooLongError(BaseException):
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLongError(f"longer than {LONGEST} s")


def judged(target: Target, folder: Path, name: str, content: bytes) -> str | None:
    """Put a changed file in its place and read it: what went wrong, or None."""
    from clip_refine.support.errors import ClipRefineError

    path = folder / name
    sound = path.read_bytes()
    path.write_bytes(content)
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LONGEST)
    try:
        target.read(folder, name)
    except ClipRefineError as error:
        return f"{len(str(error)):,} letters of message" if len(str(error)) > 20_000 else None
    except KeyboardInterrupt:
        raise
    except BaseException:  # also panics of parsers in Rust
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        path.write_bytes(sound)
    return None

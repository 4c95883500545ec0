"""Ctrl-C and SIGTERM at a boundary: a step that is under way is finished first, so that its state can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Held:
    """SIGINT and SIGTERM wait until the block is over; a second one doesn't. Does nothing outside the main thread."""

    def __enter__(self) -> None:
        self.came: int | None = None
        self.old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came is not None:
            self._release()
            signal.raise_signal(number)
        self.came = number

    def _release(self) -> None:
        for number, old in self.old.items():
            signal.signal(number, old)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._release()
        if self.came is not None and kind is None:
            signal.raise_signal(self.came)


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), as Ctrl-C raises KeyboardInterrupt, unless the program handles it itself."""
    if threading.current_thread() is not threading.main_thread() or _handled(signal.getsignal(signal.SIGTERM)):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _handled(handler: Any) -> bool:
    """Whether the program has seen to it: Ray's own handler ends its processes, and saves nothing."""
    return handler is not signal.SIG_DFL and not str(getattr(handler, "__module__", "")).startswith("ray.")

"""SIGTERM and SIGUSR2, by which batch systems announce that they take the machine away.

A worker notices them between two steps; all workers then stop at the same one. The process that drives a run asks its
workers to stop; where none run, it stops at once.
"""

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Self

from mpruner_dist.errors import Interrupted, Preempted, StageFailure

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class SignalWatch:
    """Notices the signals from any thread of a process whose main thread may never run Python again.

    The main thread of a Ray worker waits in C++, where a handler of the module `signal` does not run; and only the main
    thread may set one, which a job is not. `faulthandler` can set one from any thread, and its handler writes to a file
    at once, without Python: a file that has grown is a signal that came. It takes the place of Ray's own handler, which
    would end the process, until the watch ends.
    """

    def __init__(self) -> None:
        self._files: dict[signal.Signals, IO[bytes]] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._files[number] = os.fdopen(os.memfd_create(number.name), "wb")
            # the stack of the thread that the signal interrupts is all that it can write safely
            faulthandler.register(number, self._files[number], all_threads=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, file in self._files.items():
            faulthandler.unregister(number)
            file.close()

    def received(self) -> str | None:
        """The name of a signal that came."""
        grown = [number.name for number, file in self._files.items() if os.fstat(file.fileno()).st_size]
        return grown[0] if grown else None


@dataclass
class _Driver:
    """What the process that drives a run was told."""

    watches: bool = False
    received: str | None = None
    busy: bool = False
    """Whether something runs that must be asked to stop first."""
    request: Path | None = None
    """The file by which it is asked."""


_driver = _Driver()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Make the signals end the block with `Preempted`. For a process that drives a run, in its main thread.

    Raises:
        Preempted: a signal came.
        Interrupted: or Ctrl-C.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _driver.watches, _driver.received = True, None
    install()
    try:
        yield
    except KeyboardInterrupt:
        if _driver.received is None:
            raise Interrupted("interrupted; what was saved is kept, and the same command goes on") from None
        raise Preempted(
            f"stopped by {_driver.received}; what was saved is kept, and the same command goes on"
        ) from None
    finally:
        _driver.watches, _driver.received = False, None  # a later command of this process is not told to stop
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> None:
    """Set the handlers, again after somebody else did, if this process watches for the signals."""
    if _driver.watches:
        for number in SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def asking_first(request: Path | None) -> Iterator[None]:
    """Inside, the first signal only leaves word, in the file `request` if there is one; a second one stops at once.

    Raises:
        Preempted: a signal came, and the block ended all the same.
    """
    if request:
        request.unlink(missing_ok=True)
    _driver.busy, _driver.request = True, request
    try:
        yield
    except StageFailure:  # of a process that got the signal too, as in a Ray job
        stop_if_told()
        raise
    finally:
        _driver.busy = False
    stop_if_told()


def told() -> str | None:
    """The name of the signal that this process received."""
    return _driver.received


def stop_if_told() -> None:
    """End what this process drives, if a signal came.

    Raises:
        Preempted: one came.
    """
    if _driver.received:
        raise Preempted(f"stopped by {_driver.received}; what is finished is kept, and the same command goes on")


def _handle(number: int, _: FrameType | None) -> None:
    again = _driver.received is not None
    _driver.received = signal.Signals(number).name
    if again or not _driver.busy:
        raise KeyboardInterrupt  # the one exception that Ray lets through from a handler, which it runs once a second
    if _driver.request:
        _driver.request.touch()
    # not through `logging`, which may be in the middle of a line
    os.write(2, f"mpruner: {_driver.received}: what runs is saved first; a second signal stops at once\n".encode())

"""What can go wrong, told to the person who must act: what, where, the value, what to do.

Every exception here carries one string, so that it survives pickling between processes.
"""


def first_line(error: Exception) -> str:
    """The first line of its message, else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class MPrunerError(Exception):
    """A failure with a message for the user; the command line prints it without a traceback."""

    exit_code = 1


class UserError(MPrunerError):
    """The input is wrong: configuration, checkpoint, data, plan or run folder."""

    exit_code = 2


class NoneFits(UserError):
    """A plan that removes so many layers, or just these, is not as it must be; another may be."""


class StageFailure(MPrunerError):
    """A stage could not finish although its input is right: a full disk, a lost worker, a failed proof."""

    exit_code = 1


class Fruitless(StageFailure):
    """A stage did its work and nothing came of it, and from the same inputs it would end the same.

    Weights that are not finite, or that did not move.
    """


class Interrupted(MPrunerError):
    """Stopped from the keyboard: the same command goes on."""

    exit_code = 130


class Preempted(MPrunerError):
    """Told to stop, by SIGTERM or SIGUSR2, with the work saved: the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: batch systems put such a job back into their queue

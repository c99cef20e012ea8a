"""The ways a command can end that are not a bug. Each carries its exit code; the command line shows its one line."""


class CommandError(Exception):
    """Ends a command with `exit_code` and its message as one line, without a traceback."""

    exit_code = 1


class UserError(CommandError, ValueError):
    """A mistake of the person at the keyboard: name the value, the field and the cure."""

    exit_code = 2


class Diverged(CommandError):
    """The run produced numbers that are not worth continuing from."""

    exit_code = 3


class NoValidCheckpoint(CommandError):
    """A checkpoint was required and none can be trusted."""

    exit_code = 4


class Preempted(CommandError):
    """The run was asked to stop, saved, and continues when the same command runs again."""

    exit_code = 75

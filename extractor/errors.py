"""The errors a user can cause, each with the exit code its recipe ends in."""


class SparsebridgeError(ValueError):
    """A mistake in what the user gave: one clear line, no traceback."""

    exit_code = 1


class UsageError(SparsebridgeError):
    """A wrong key, type or value in a config or on the command line."""

    exit_code = 2


class InputError(SparsebridgeError):
    """A checkpoint, text or task that is refused; the message says why."""

    exit_code = 3


class UnsupportedModelError(InputError):
    """A dense checkpoint of a family whose residual stream is not proved readable."""


class DivergedError(SparsebridgeError):
    """Training left the finite numbers; the last checkpoint is whole."""

    exit_code = 5


class MachineError(SparsebridgeError):
    """The machine will not have it: no room, no right to write."""

    exit_code = 4


class StoppedError(SparsebridgeError):
    """Stopped from outside after a step, with a checkpoint; the same command goes on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code

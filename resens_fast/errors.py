"""What can go wrong, one class per room; every message is one sentence that names the value and the way out."""


class ResensError(ValueError):
    """Base of every error that a user's input can cause; the command line turns it into one line and exit code 2."""


class WrapError(ResensError):
    """The model cannot be wrapped: nothing residual was found, or the wrapped network differs from it."""


class SweepError(ResensError):
    """A sweep that cannot be built or does not belong to this network."""


class PlanError(ResensError):
    """A plan or schedule that cannot be drawn, such as a budget of buffers that is too small."""


class DataError(ResensError):
    """Images or labels that do not fit the network, or a data set that is missing, empty or damaged."""


class ModelError(ResensError):
    """An unknown network name or a checkpoint that does not fit."""


class StudyError(ResensError):
    """A study folder that is damaged, incomplete or belongs to another evaluation."""


class EngineError(ResensError):
    """An engine that is missing on this machine or cannot run what was asked."""


class NotCovered(EngineError):
    """A fused engine does not cover a block; the message names it."""


def first_line(reason: BaseException) -> str:
    """An exception's first line, for use inside a sentence."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0].rstrip(".")

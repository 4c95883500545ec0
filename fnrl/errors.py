"""The errors fnrl raises, by what the user can do about them."""


class CompositionError(ValueError):
    """Parts or nodes that don't fit together; raised when they are composed, before an environment starts."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity in an observation, reward, loss or parameter: where, and with which key to find it again."""


class DeadLaneWarning(UserWarning):
    """A lane of seeds turned non-finite and stands still from there on; the others go on."""


class LagWarning(UserWarning):
    """Most of what asynchronous workers make is dropped: it lags more than `max_lag` allows."""


class EnvironmentFault(RuntimeError):
    """An environment raised, hung, died, or broke its own declaration (shape, dtype, seed).

    `lost` says that it raised, or that its process died or hung: another one may not.
    """

    lost: bool = False


class StaleStateError(RuntimeError):
    """A state was stepped after a later one had been made from it, and its owner can't go back."""


class ExecutorError(RuntimeError):
    """A cluster that can't be used, or a worker that failed again and again: which, how often, and its cause."""


class DivergedError(RuntimeError):
    """Replicas that apply updates themselves no longer hold the same bits: which, and since when."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or doesn't fit the scheme it is restored into."""


class CompilerWarning(RuntimeWarning):
    """A run was asked to compile, and there is no compiler: it is eager."""

"""What went wrong with a call: a fault of the cluster, which another process may not meet again, or the node's own."""

from fnrl import errors
from fnrl.errors import EnvironmentFault

HELP = {
    "died": "its process died",
    "hung": "it gave no answer within its deadline",
    "node": "its node was lost",
    "memory": "it was killed because its node ran out of memory",
    "lost": "an object it needed, or had made, was lost",
    "environment": "a simulator raised, died or hung",
}


def kind_of(error: BaseException) -> str | None:
    """One of `HELP`; None for what the node itself raised, and for what no other process would mend."""
    from ray import exceptions as ray

    if isinstance(error, ray.RayTaskError):
        cause = error.cause
        if isinstance(cause, EnvironmentFault):
            return "environment" if cause.lost else None
        return kind_of(cause) if isinstance(cause, ray.RayError) else None
    if isinstance(error, ray.GetTimeoutError):
        return "hung"
    if isinstance(error, ray.OutOfMemoryError):
        return "memory"
    if isinstance(error, ray.NodeDiedError):
        return "node"
    if isinstance(error, ray.RayActorError):
        if getattr(error, "actor_init_failed", False):
            return None
        return "node" if error.preempted or "node has died" in str(error) or "node was" in str(error) else "died"
    if isinstance(error, ray.WorkerCrashedError):
        return "died"
    return "lost" if isinstance(error, ray.ObjectLostError | ray.PlasmaObjectNotAvailable) else None


def own_error(error: BaseException, name: str) -> BaseException:
    """What the node raised, with its own type; fnrl's errors begin with the worker, others have a note of it."""
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError) or not isinstance(error.cause, Exception):
        return error
    cause = error.cause
    if isinstance(cause, EnvironmentFault):
        cause.lost = False  # it was tried again: whoever is above need not
    if type(cause).__module__ == errors.__name__ and cause.args:
        cause.args = (f"{name}: {cause.args[0]}", *cause.args[1:])
    else:
        cause.add_note(f"raised by {name}")
    cause.add_note(f"in its cell:\n{error}")
    return cause

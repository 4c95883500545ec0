"""A trained policy by itself: numpy observations in, the environment's actions out; one file to keep and ship.

The file is safetensors: the parameters by name and, where observations are normalised, their running moments. Its
header says which actor they belong to, as JSON, with the SHA-256 of the tensors and of itself. Reading runs no pickle.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fnrl import checkpoint, lanes, manifest, random, tree
from fnrl.collect import act
from fnrl.component import printed
from fnrl.config import rebuild
from fnrl.errors import CheckpointError, NonFiniteError
from fnrl.spaces import Box, Space
from fnrl.types import ALGORITHMS, Moments, Normaliser, Params, Tree, Weights

Array = np.ndarray[Any, Any]

FILE = "policy.safetensors"
_HEADER, _MOMENTS = "fnrl.policy", "normaliser."
_HINT = "pass the actor, as load_policy(path, actor=OnPolicyActorCritic(...))"


@dataclasses.dataclass(frozen=True)
class Policy:
    """The most likely action for an observation: a function without state or randomness, made by `load_policy`."""

    actor: Any
    params: Params
    normaliser: Tree = ()
    env_steps: int = 0

    @property
    def recurrent(self) -> bool:
        """Whether it takes and returns a memory."""
        forgets = getattr(self.actor, "recurrent", ...) is None  # what exploration carries doesn't count
        return not forgets and bool(self.actor.memory(1).shape[-1])

    def initial(self, n: int | None = None) -> Array:
        """The memory at the start of an episode, `[H]`, or of n episodes `[n, H]`."""
        memory = self.actor.memory(n or 1).numpy()
        return memory[0] if n is None else memory

    def __call__(self, obs: Any, memory: Array | None = None) -> Any:
        """The action for one observation `[*O]`, or the actions for a batch `[N, *O]`, as the environment takes them;
        observations with goals as the environment gives them, or flat.

        A recurrent policy takes the memory too (`initial()` at the start of an episode) and returns `(action, memory)`.
        Errors: ValueError for an observation or memory of another shape, NonFiniteError for a NaN or an infinity.
        """
        space, goal = self.actor.spec.obs, self.actor.spec.goal
        if goal is not None and isinstance(obs, Mapping):
            obs = goal.join(obs, self.actor.spec.name)
        seen = torch.from_numpy(_counted(np.array(obs, copy=True), space, self.actor.spec.name)).to(space.stored)
        single = seen.dim() == len(space.shape)
        if single:
            seen = seen[None]
        if tuple(seen.shape[1:]) != space.shape or seen.dim() != len(space.shape) + 1:
            raise ValueError(
                f"an observation of {self.actor.spec.name} is {list(space.shape)}, a batch {['N', *space.shape]}; "
                f"got {list(np.shape(obs))}"
            )
        if seen.is_floating_point() and not bool(torch.isfinite(seen).all()):
            raise NonFiniteError(f"the observation is not finite: {np.asarray(obs)}")
        with torch.inference_mode():
            _, action, _, after = act(
                self.actor, self.params, self.normaliser, seen, self._memory(memory, single, len(seen)), None
            )
        taken = action.numpy()
        if isinstance(self.actor.spec.action, Box):
            taken = self.actor.spec.action.cast(taken)
        if not self.recurrent:
            return taken[0] if single else taken
        return (taken[0], after[0].numpy()) if single else (taken, after.numpy())

    def _memory(self, memory: Array | None, single: bool, n: int) -> Tensor:
        fresh = self.actor.memory(n)
        if memory is None and self.recurrent:
            raise ValueError("this policy is recurrent: begin with memory = policy.initial(), then policy(obs, memory)")
        if memory is None:
            return fresh
        given = torch.from_numpy(np.array(memory, dtype=np.float32))
        given = given[None] if single else given
        if given.shape != fresh.shape:
            raise ValueError(
                f"expected a memory {list(fresh.shape[1:] if single else fresh.shape)}, got {list(np.shape(memory))}"
            )
        return given

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the policy to one file, whole or not at all."""
        target = Path(path)
        tensors = {n: v.detach().clone() for n, v in self.params.tree().items()}
        said: dict[str, Any] = {"format": 1, "actor": printed(self.actor), "env_steps": self.env_steps, "clip": None}
        if not isinstance(self.normaliser, tuple):
            said["clip"] = self.normaliser.clip
            moments = self.normaliser.moments
            tensors |= {_MOMENTS + n: getattr(moments, n).clone() for n in ("count", "mean", "m2")}
        said["names"], said["sha256"] = list(tensors), _digest(tensors)
        data = safetensors.torch.save(tensors, {_HEADER: manifest.seal(said).decode()})
        beside = target.with_name(f".{target.name}.tmp")
        with open(beside, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, target)
        return target


def policy_of(actor: Any, weights: Weights) -> Policy:
    """The policy of some weights of one seed, on the CPU."""
    params, normaliser = tree.to((weights.params, weights.normaliser), "cpu")
    if ALGORITHMS in params.layout.groups:
        params = Params.of({n: x for n, x in params.tree().items() if n.split(".")[0] != ALGORITHMS})
    return Policy(actor, params, normaliser, weights.env_steps)


def save_lanes(actor: Any, weights: Weights, places: dict[int, int], path: Path) -> Path:
    """Writes a policy for each lane (`places`: where the lanes lie, by number) beside `path`; gives the directory."""
    for number, place in places.items():
        policy_of(actor, tree.index(weights, place)).save(path.with_stem(f"{path.stem}-lane{number}"))
    return path.parent


def load_policy(
    path: str | os.PathLike[str], actor: Any = None, seed: int | None = None, lane: int | None = None
) -> Policy:
    """The policy of a run directory (its newest good checkpoint), of one checkpoint, or of a file that was saved.

    Of a run with lanes, that of the lane with this seed, or, where several have it (a sweep), of the lane of a number.
    `actor` is needed only for networks of your own: files name fnrl's components, and nothing else is built from them.
    Errors: CheckpointError when it is missing, damaged, or doesn't fit the actor.
    """
    where = Path(path)
    if where.is_dir() and (where / FILE).exists() and not any(where.glob("step-*")):
        where = where / FILE
    if not where.exists():
        raise CheckpointError(
            f"{where} does not exist: expected a run directory, a checkpoint in it, or a saved policy"
        )
    if where.is_file():
        return _read(where, actor)
    found = checkpoint.load(where) if where.name.startswith("step-") else checkpoint.newest(where)
    state = getattr(found.state, "scheme", found.state)
    weights = state.weights
    if getattr(state, "lanes", None) is not None or seed is not None or lane is not None:
        weights = tree.index(weights, _place(found, state, seed, lane))
    if actor is None:
        actor = rebuild(_actor_in(found), _HINT)
    policy = policy_of(actor, weights)
    _fits(policy, found.path)
    return policy


def _place(found: checkpoint.Checkpoint, state: Any, seed: int | None, lane: int | None) -> int:
    """Where the lane that is asked for lies in a state."""
    if getattr(state, "lanes", None) is None:
        raise CheckpointError(f"{found.path} is a run of one seed: it has no lanes to choose from")
    where = lanes.shown(state)
    seeds = getattr(getattr(found.state, "settings", None), "seeds", ())
    fits = [n for n in where if (lane is None or n == lane) and (seed is None or seeds[n : n + 1] == (seed,))]
    if len(fits) == 1:
        return where[fits[0]]
    there = ", ".join(f"{n} (seed {seeds[n]})" if n < len(seeds) else str(n) for n in where)
    raise CheckpointError(
        f"{found.path} holds lanes, and a policy is one lane's; load_policy(seed={seed}, lane={lane}) fits "
        f"{len(fits)} of them: {there}"
    )


def _actor_in(found: checkpoint.Checkpoint) -> Any:
    try:
        return found.config["parts"]["actor"]
    except (TypeError, KeyError):
        raise CheckpointError(f"{found.path} was saved without the configuration of its scheme: {_HINT}") from None


def _read(path: Path, actor: Any) -> Policy:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read as a saved policy: {error}") from error
    if header is None:
        raise CheckpointError(f"{path} is not a policy saved by fnrl: its header says nothing of an actor")
    try:
        said = manifest.unseal(header.encode())
        if said["names"] != [n for n in said["names"] if n in tensors] or len(said["names"]) != len(tensors):
            raise CheckpointError("it holds other tensors than its header names")
        tensors = {n: tensors[n] for n in said["names"]}
        if _digest(tensors) != said["sha256"]:
            raise CheckpointError("its tensors don't have the SHA-256 in the header: they were changed")
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    moments = {n.removeprefix(_MOMENTS): tensors.pop(n) for n in list(tensors) if n.startswith(_MOMENTS)}
    normaliser = Normaliser(Moments(**moments), said["clip"]) if moments else ()
    made = rebuild(said["actor"], _HINT) if actor is None else actor
    policy = Policy(made, Params.of(tensors), normaliser, said["env_steps"])
    _fits(policy, path)
    return policy


def _fits(policy: Policy, path: Path) -> None:
    expected, found = policy.actor.init(random.key(0)).layout, policy.params.layout
    if expected != found:
        here, there = (dict(zip(x.names, x.shapes, strict=True)) for x in (expected, found))
        wrong = [
            f"{n}: the actor has {here.get(n)}, the file {there.get(n)}"
            for n in {**here, **there}
            if here.get(n) != there.get(n)
        ]
        raise CheckpointError(
            "\n  ".join([f"{path} doesn't fit the actor:", *(wrong or ["another order of parameters"])])
        )


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors.values():
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def _counted(obs: Array, space: Space, name: str) -> Array:
    """An observation as actors take it: integers counted from 0. Errors: ValueError for one outside the space."""
    if isinstance(space, Box):
        return obs
    inside = obs.dtype.kind in "iu" and bool(((obs >= space.start) & (obs < space.start + space.n)).all())
    if not inside:
        raise ValueError(
            f"an observation of {name} is one of the integers {space.start} to {space.start + space.n - 1}; got {obs}"
        )
    return np.asarray(obs - space.start)

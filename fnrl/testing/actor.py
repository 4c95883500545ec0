"""The laws of actors."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fnrl import random, tree
from fnrl.spaces import Discrete, Space
from fnrl.testing import laws, strategies
from fnrl.types import Params, Transition

APART = "environments of a vector do not touch each other"
AGREE = "evaluating a stored action gives what acting gave"
INSIDE = "the environment's action lies in its space"
BLANK = "memory is zero where an episode begins"
MOVES = "every parameter gets a gradient"


def check_actor(actor: Any, *, max_examples: int = 5, compiled: bool = False) -> None:
    """The laws of an on-policy actor: `init, memory, noise, act, evaluate, values`.

    Besides purity, determinism, lanes, shapes, finiteness and being a value: keys decide parameters and noise, actions
    lie in the space, environments don't touch each other, memory starts at zero, `evaluate` of a rollout gives the
    `logp` and the memories that acting gave (over the ends of episodes too), and every parameter gets a gradient.
    `compiled` traces `act` and `evaluate` as well. Errors: LawError.
    """
    laws.check_value(actor)

    def law(seed: int, steps: int, envs: int, terminated: float, truncated: float) -> None:
        examples = [_Example(actor, seed + i, steps, envs, terminated, truncated) for i in range(3)]
        _check_init(actor, examples[0])
        _check_noise(actor, examples)
        _check_act(actor, examples)
        _check_evaluate(actor, examples)

    chance = strategies.chances()
    sizes = {"steps": st.integers(1, 4), "envs": st.integers(1, 3)}
    laws.for_all(law, max_examples, seed=st.integers(0, 2**31), terminated=chance, truncated=chance, **sizes)
    _check_gradients(actor)
    if compiled:
        example = _Example(actor, 0, 3, 2, 0.3, 0.3)
        laws.check_compiled(actor, actor.act, *example.act_at(0))
        laws.check_compiled(actor, actor.evaluate, *example.evaluated())


def acted(actor: Any, params: Params, steps: Transition, key: Tensor) -> tuple[Transition, Tensor]:
    """Transitions `[T, N]` with the actions, `logp` and memories that `actor` gives on their observations, and the
    memory after each step `[T, N, H]`.
    """
    length, envs = steps.reward.shape
    noise, memory = actor.noise(key, length, envs), actor.memory(envs)
    done, out = steps.terminated | steps.truncated, []
    for t in range(length):
        action, _, logp, after = actor.act(params, steps.obs[t], memory, tree.index(noise, t))
        out.append((action, logp, memory, after))
        memory = torch.where(done[t][:, None], 0.0, after)
    actions, logps, memories, afters = (torch.stack(x) for x in zip(*out, strict=True))
    rest = (steps.reward, steps.terminated, steps.truncated, steps.next_obs)
    return Transition(steps.obs, actions, logps, *rest, memories), afters


class _Example:
    """Parameters, and a rollout acted with them."""

    def __init__(self, actor: Any, seed: int, steps: int, envs: int, terminated: float, truncated: float) -> None:
        self.key = random.key(seed)
        self.params = actor.init(self.key)
        self.memory = actor.memory(envs)
        made = strategies.make_rollout(actor.spec, steps, envs, seed, terminated, truncated)
        self.steps, self.afters = acted(actor, self.params, made, random.fold_in(self.key, 1))
        self.noise = actor.noise(random.fold_in(self.key, 1), steps, envs)
        done = made.terminated | made.truncated
        self.starts = torch.cat([torch.zeros_like(done[:1]), done[:-1]])

    def act_at(self, t: int) -> tuple[Any, ...]:
        return self.params, self.steps.obs[t], self.steps.memory[t], tree.index(self.noise, t)

    def evaluated(self) -> tuple[Any, ...]:
        return self.params, self.steps.obs, self.memory, self.starts, self.steps.action


def _check_init(actor: Any, example: _Example) -> None:
    params = laws.check_call(actor, actor.init, example.key)
    if not isinstance(params, Params):
        laws.broken(actor, laws.SHAPES, f"init gives a {type(params).__name__}, expected fnrl.types.Params")
    laws.expect(actor, "the parameters of init", params.vector, (None,), torch.float32)
    laws.finite(actor, "the parameters of init", params)
    laws.check_saved(actor, "the parameters", params)
    if tree.same_bits(params, actor.init(random.fold_in(example.key, 1))):
        laws.broken(actor, laws.KEYS, "init gives the same parameters for two keys")
    envs = example.memory.shape[0]
    laws.expect(actor, f"memory({envs})", example.memory, (envs, None), torch.float32)
    if bool((example.memory != 0.0).any()):
        laws.broken(actor, BLANK, f"memory({envs}) is not zero, but it is zero after the end of an episode")


def _check_noise(actor: Any, examples: list[_Example]) -> None:
    steps, envs = examples[0].steps.reward.shape
    noise = laws.check_call(actor, actor.noise, examples[0].key, steps, envs)
    for path, x in tree.paths(noise):
        if tuple(x.shape[:2]) != (steps, envs):
            laws.broken(actor, laws.SHAPES, f"noise{path} is {list(x.shape)}, expected [{steps}, {envs}, ...]")
    laws.finite(actor, "noise", noise)
    laws.check_lanes(actor, actor.noise, *((e.key, steps, envs) for e in examples))
    leaves = tree.leaves(noise)
    if any(x.is_floating_point() and x.numel() for x in leaves) and tree.same_bits(
        noise, actor.noise(examples[1].key, steps, envs)
    ):
        laws.broken(actor, laws.KEYS, "noise is the same for two keys")


def _check_act(actor: Any, examples: list[_Example]) -> None:
    example, space = examples[0], actor.spec.action
    last = example.steps.reward.shape[0] - 1
    envs = example.memory.shape[0]
    dtype = torch.int64 if isinstance(space, Discrete) else torch.float32
    for call in (example.act_at(0), (*example.act_at(last)[:3], None)):
        action, env_action, logp, memory = laws.check_call(actor, actor.act, *call)
        laws.expect(actor, "the environment's action", env_action, (envs, *space.shape), dtype)
        laws.expect(actor, "logp of act", logp, (envs,), torch.float32)
        laws.expect(actor, "the memory after act", memory, tuple(example.memory.shape), torch.float32)
        laws.finite(actor, "what act gives", (action, env_action, logp, memory))
        _check_inside(actor, space, env_action)
        for i in range(envs):
            row = slice(i, i + 1)
            alone = actor.act(call[0], *(x if x is None else tree.index(x, row) for x in call[1:]))
            together = tree.index((action, env_action, logp, memory), row)
            laws.close(actor, APART, together, alone, f"environment {i} of {envs}", "alone")
    laws.check_lanes(actor, actor.act, *(e.act_at(last) for e in examples))
    laws.check_lanes(actor, actor.act, *((*e.act_at(0)[:3], None) for e in examples))


def _check_inside(actor: Any, space: Space, action: Tensor) -> None:
    if isinstance(space, Discrete):
        low, high = torch.tensor(space.start), torch.tensor(space.start + space.n - 1)
    else:
        low, high = (b + sign * 1e-6 * b.abs() for b, sign in zip(space.bounds(), (-1, 1), strict=True))
    if bool(((action < low) | (action > high)).any()):
        laws.broken(actor, INSIDE, f"act gives {action.tolist()} for {space}")


def _check_evaluate(actor: Any, examples: list[_Example]) -> None:
    example = examples[0]
    steps, envs = example.steps.reward.shape
    logp, entropy, value, memories = laws.check_call(actor, actor.evaluate, *example.evaluated())
    for name, x in (("logp", logp), ("entropy", entropy), ("value", value)):
        laws.expect(actor, f"{name} of evaluate", x, (steps, envs), torch.float32)
    laws.expect(actor, "the memories of evaluate", memories, (steps, *example.memory.shape), torch.float32)
    laws.finite(actor, "what evaluate gives", (logp, entropy, value, memories))
    names = ("evaluate", "act")
    laws.close(actor, AGREE, {"logp": logp}, {"logp": example.steps.logp}, *names)
    laws.close(actor, AGREE, {"memory": memories}, {"memory": example.afters}, *names)
    params, obs, memory, starts, _ = example.evaluated()
    alone = laws.check_call(actor, actor.values, params, obs, memory, starts)
    laws.close(
        actor,
        AGREE,
        {"value": value, "memory": memories},
        dict(zip(("value", "memory"), alone, strict=True)),
        "evaluate",
        "values",
    )
    laws.check_lanes(actor, actor.evaluate, *(e.evaluated() for e in examples))
    laws.check_lanes(actor, actor.values, *(e.evaluated()[:4] for e in examples))


def _check_gradients(actor: Any) -> None:
    """On a rollout without ends (so that memory matters), and on observations that are all zero."""
    example = _Example(actor, 0, 4, 8, 0.0, 0.0)
    params, obs, *rest = example.evaluated()
    vector = params.vector.detach().requires_grad_()

    def gradient(x: Tensor) -> Params:
        logp, entropy, value, _ = actor.evaluate(Params(vector, params.layout), x, *rest)
        logp_weight = torch.linspace(0.5, 1.5, logp.numel()).reshape(logp.shape)
        (found,) = torch.autograd.grad((logp * logp_weight + entropy + value).sum(), vector)
        return Params(found, params.layout)

    for what, x in (("", obs), (" at observations of zero", torch.zeros_like(obs))):
        laws.finite(actor, f"the gradient of logp, entropy and value{what}", gradient(x).tree())
    one_choice = isinstance(actor.spec.action, Discrete) and actor.spec.action.n == 1
    still = [n for n, g in gradient(obs).tree().items() if g.numel() and not bool(g.any())]
    if still and not one_choice:
        laws.broken(actor, MOVES, f"logp, entropy and value of 32 steps do not depend on {', '.join(still)}")

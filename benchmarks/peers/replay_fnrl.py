"""fnrl's side of the replay benchmark: `CASE ENVS` -> one line of JSON."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timed import peak_memory

import fnrl
from fnrl import random
from fnrl.checkpoint import Checkpoints
from fnrl.record import replace
from fnrl.storages.replay import ReplayState
from fnrl.types import Params, Rollout, Sampling, Transition, Weights

case, envs = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
WEIGHTS = Weights(Params(torch.zeros(0), ()), (), {"gamma": torch.tensor(0.99)}, (), 0, 0)


def resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def rollout(steps: int, obs: torch.Tensor) -> Rollout:
    """Steps of HalfCheetah's sizes, with observations `[T + 1, N, ...]`, that end every 1000th time."""
    ends = torch.zeros(steps, envs, dtype=torch.bool)
    ends[999::1000] = True
    zeros, action = torch.zeros(steps, envs), torch.rand(steps, envs, 6)
    made = Transition(obs[:-1], action, zeros, zeros, ends & False, ends, obs[1:], zeros[..., None][..., :0])
    return Rollout(made, (), 0, steps * envs)


def cheetah(steps: int) -> Rollout:
    """Of HalfCheetah."""
    return rollout(steps, torch.randn(steps + 1, envs, 26))


def filled(storage: fnrl.Replay, made: Rollout, transitions: int) -> ReplayState:
    """A ring that has been given so many."""
    state = storage.init()
    for _ in range(transitions // made.env_steps):
        state = storage.append(state, made)
    return state


def memory() -> dict[str, Any]:
    """Of a full ring of 1e6 transitions of HalfCheetah."""
    storage, made = fnrl.Replay(capacity=1_000_000), cheetah(1000)
    before = resident()
    state = filled(storage, made, 1_100_000)
    return {"megabytes": resident() - before, "rows": state.token.owner.size}  # type: ignore[union-attr]


def frames() -> dict[str, Any]:
    """Of a full ring of 1e5 stacks of four frames of 84 x 84: a film of 100 frames, over and over."""
    film = torch.randint(0, 255, (100, envs, 84, 84), dtype=torch.uint8)
    obs = torch.stack([film.roll(3 - i, 0) for i in range(4)], 2)
    made = rollout(100, torch.cat([obs, obs[:1]]))
    before = resident()
    state = filled(fnrl.Replay(capacity=100_000, frames=fnrl.Frames(4)), made, 110_000)
    return {"megabytes": resident() - before, "rows": state.token.owner.size}  # type: ignore[union-attr]


def times() -> dict[str, Any]:
    """Microseconds of appending one vector step, and of a plan of one batch of 256, on a full ring of 1e6."""
    storage = fnrl.Replay(capacity=1_000_000, warmup=0)
    state, step = filled(storage, cheetah(1000), 1_100_000), cheetah(1)
    begin = time.process_time()
    for _ in range(2000):
        state = storage.append(state, step)
    append = time.process_time() - begin
    keys = random.split(random.key(0), 2050).unbind(0)
    for i, key in enumerate(keys):
        if i == 50:
            begin = time.process_time()
        plan, state = Sampling((i + 1.5) / state.collected, 256), replace(state, rate=None)  # one update is earned
        state, data, rows = storage.batches(lambda f: f, state, None, WEIGHTS, plan, envs, key)  # type: ignore[arg-type]
        assert storage.take(data, rows[0]).obs.shape == (256, 26)
    return {"append": append / 2000 * 1e6, "batch": (time.process_time() - begin) / 2000 * 1e6}


def save() -> dict[str, Any]:
    """Seconds and peak memory of the first checkpoint of a full ring of 1e6, and of one 10,000 transitions later."""
    storage = fnrl.Replay(capacity=1_000_000)
    state = filled(storage, cheetah(1000), 1_100_000)
    later = filled_on(storage, state)
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home, Checkpoints(home, keep=2) as runs:
        for n, name in enumerate(("first", "later")):
            state = state if name == "first" else later()
            resting, begin = peak_memory(), time.perf_counter()
            path = runs.save(storage.gather(state, copy=False), step=n)
            out[name] = {"seconds": time.perf_counter() - begin, "peak_mb": peak_memory() - resting}
            new = [p.stat() for p in path.iterdir() if p.stat().st_nlink == 1]
            out[name]["written_mb"] = sum(s.st_size for s in new) / 1e6
        begin = time.perf_counter()
        state = storage.restore(runs.newest().state, copy=False)
        out["resume"] = {"seconds": time.perf_counter() - begin}
    return out


def filled_on(storage: fnrl.Replay, state: ReplayState) -> Any:
    """What gives the ring 10,000 transitions more."""

    def later() -> ReplayState:
        now, made = state, cheetah(1000)
        for _ in range(10_000 // made.env_steps):
            now = storage.append(now, made)
        return now

    return later


print(json.dumps({"memory": memory, "frames": frames, "times": times, "save": save}[case]()))

"""The replay: its memory, its times against cpprb and stable-baselines3, and what a checkpoint of it costs.

Every measurement is a process of its own with one thread. Times are of CPU, medians of `--repeats` alternations, and
the peer is the slower of the two: the bar is to be no slower than either one of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from harness import HERE, Row, main, one_thread, peer_python

PACKAGES = ["cpprb==11.0.0", "stable-baselines3==2.9.2"]


def measured(*command: Any) -> Any:
    """What a program of `peers/` prints."""
    run = [str(x) for x in command]
    out = subprocess.run(run, check=True, env=one_thread(), capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def ours(case: str, envs: int = 1) -> Any:
    """One case of fnrl."""
    return measured(sys.executable, HERE / "peers" / "replay_fnrl.py", case, envs)


def case_memory(args: argparse.Namespace) -> Iterator[Row]:
    """A ring of 1e6 transitions of HalfCheetah (26 + 6 floats): at most 150 MB."""
    found = ours("memory", 8)
    yield Row("memory", f"MB of {found['rows'] * 8:,} transitions", found["megabytes"], 150, False, found)


def case_frames(args: argparse.Namespace) -> Iterator[Row]:
    """A ring of 1e5 stacks of four frames of 84 x 84 bytes: at most 0.8 GB."""
    found = ours("frames")
    yield Row("frames", f"MB of {found['rows']:,} stacks of frames", found["megabytes"], 800, False, found)


def case_times(args: argparse.Namespace) -> Iterator[Row]:
    """One vector step appended and a batch of 256 drawn: no slower than cpprb or stable-baselines3."""
    python = peer_python("cpprb", PACKAGES)
    for envs in (1, 8):
        pairs = []
        for i in range(args.repeats):
            mine = ours("times", envs) if i % 2 == 0 else None
            theirs = measured(python, HERE / "peers" / "replay_peers.py", envs)
            pairs.append((mine or ours("times", envs), theirs))
        for what in ("append", "batch"):
            yield Row(f"times, {envs} envs", f"fnrl {what}, us", statistics.median(a[what] for a, _ in pairs))
            for peer in ("cpprb", "stable-baselines3"):
                ratios = [a[what] / b[peer][what] for a, b in pairs]
                spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
                yield Row(
                    f"times, {envs} envs", f"{what} over {peer} {spread}", statistics.median(ratios), detail=pairs
                )
            best = [a[what] / max(b[peer][what] for peer in b) for a, b in pairs]
            yield Row(f"times, {envs} envs", f"{what} over the slower peer", statistics.median(best), 1.0, False)


def case_save(args: argparse.Namespace) -> Iterator[Row]:
    """Checkpoints of a ring of 1e6 transitions of HalfCheetah, the first and one 10,000 transitions later."""
    found = ours("save", 8)
    for name in ("first", "later"):
        yield Row("save", f"{name}: seconds", found[name]["seconds"])
        yield Row("save", f"{name}: MB written", found[name]["written_mb"], 10 if name == "later" else None, False)
        yield Row("save", f"{name}: MB of memory above the run's", found[name]["peak_mb"], 40, False, found)
    yield Row("save", "resume: seconds", found["resume"]["seconds"])


if __name__ == "__main__":
    main(
        __doc__ or "",
        {"memory": case_memory, "frames": case_frames, "times": case_times, "save": case_save},
        repeats={"type": int, "default": 5, "help": "alternations of fnrl and the peers"},
    )

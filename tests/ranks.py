"""A pool of processes with gloo groups of 1, 2, 3 and 4 ranks, which run functions by name.

Starting a process costs seconds, so that one pool serves a whole module: `pool.run(world, job,
*arguments)` calls `job(group, *arguments)` on the first `world` ranks and returns what each of them
returns, or raises `JobError` with what they raised. A name instead of a number is one of BRIEF.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

RANKS = 4

#: Groups of two ranks with a timeout of a second, each good for one failure.
BRIEF = ("brief None", "brief [10, 10]")


class JobError(Exception):
    """What the ranks raised: (type's name, message) for each, or None."""

    def __init__(self, errors: list[tuple[str, str] | None]) -> None:
        super().__init__("\n".join(error[1] for error in errors if error))
        self.errors = errors


class Pool:
    """Started with the first job."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        path = os.path.join(tempfile.mkdtemp(), "store")
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, path, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, world: int | str, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        pipes = self._pipes[: world if isinstance(world, int) else 2]
        for pipe in pipes:
            pipe.send((world, job, arguments))
        answers = [pipe.recv() for pipe in pipes]
        errors = [error for _, error in answers]
        if any(errors):
            raise JobError(errors)
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)


def _serve(rank: int, path: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(path, RANKS)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    groups = {world: dist.new_group(list(range(world))) for world in range(1, RANKS + 1)}
    brief = datetime.timedelta(seconds=1)
    groups |= {name: dist.new_group([0, 1], timeout=brief) for name in BRIEF}
    while (task := pipe.recv()) is not None:
        world, job, arguments = task
        try:
            pipe.send((job(groups[world], *arguments), None))
        except Exception as error:
            pipe.send((None, (type(error).__name__, f"{error}\n{traceback.format_exc()}")))
    dist.destroy_process_group()

"""Runs a function in several processes that share a gloo group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def _worker(rank: int, size: int, folder: str, run: Callable[[int, int], Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.save(run(rank, size), f"{folder}/{rank}")
    dist.barrier()
    # destroy_process_group of gloo may abort, or hang on torch 2.6.
    os._exit(0)


def run_in(size: int, run: Callable[[int, int], Any]) -> list[Any]:
    """Returns the results of `run(rank, size)` in each of `size` processes.

    `run` is a function of a module, since it is pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        if size == 1:
            return [run(0, 1)]
        spawn(_worker, (size, folder, run), nprocs=size)
        return [torch.load(Path(folder) / str(rank)) for rank in range(size)]

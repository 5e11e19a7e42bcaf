"""A rank's membership: its share of the model and the process group in which the ranks add up and gather.

gloo on CPUs, NCCL on CUDA. A collective that a member does not enter ends with an error after TIMEOUT_S, on every rank
that waits in it. The group is an object of ours, not torch's global one. Engine process and its ranks.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine_proc.parallel.share import Share

TIMEOUT_S = 30                  # below --hang-timeout's default: a lost rank is known before the loop counts as hung
LOOPBACK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(slots=True)
class Team:
    """One rank's view of all."""

    share: Share
    group: Any                      # dist.ProcessGroupGloo or dist.ProcessGroupNCCL

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, in x's dtype; the same bits on every rank."""
        self.group.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's x, all of one shape, on rank 0; None on the others."""
        parts = [torch.empty_like(x) for _ in range(self.share.size)] if self.share.rank == 0 else None
        options = dist.GatherOptions()
        options.rootRank = 0
        self.group.gather([] if parts is None else [parts], [x], options).wait()
        return parts


def join(share: Share, store: Path, device: torch.device) -> Team:
    """Meet the other ranks through the file `store`; all of them call this. Connections stay on this machine."""
    for name in LOOPBACK:
        os.environ.setdefault(name, "lo")
    meeting, timeout = dist.FileStore(str(store), share.size), timedelta(seconds=TIMEOUT_S)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return Team(share, dist.ProcessGroupNCCL(meeting, share.rank, share.size, options))
    return Team(share, dist.ProcessGroupGloo(meeting, share.rank, share.size, timeout))

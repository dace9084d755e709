"""A program for the launcher's tests: a collective, then what its argument says; a stop signal is saved and obeyed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> int:
    """`say`: end well; `refuse`: as for a bad recipe; `wait`: until a signal comes, then save and end as stopped."""
    folder, act = Path(sys.argv[1]), sys.argv[2]
    stopping = [False]
    signal.signal(signal.SIGTERM, lambda *_: stopping.__setitem__(0, True))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print(f"sum over the ranks: {int(total)}", flush=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if act == "refuse" and rank == 1:
        print("RecipeError: pattern: 3:2 keeps more than there is", file=sys.stderr, flush=True)
        return 2
    while act == "wait" and not stopping[0]:
        time.sleep(0.05)
    if stopping[0]:
        (folder / f"saved-{rank}").touch()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a rank does before its program: end with torchrun, and leave its exit code where the launcher finds it.

torchrun puts each rank into a session of its own and forgets its exit code; one that is killed orphans its ranks. So
`python -m flows.rank MODULE ARGUMENTS…` asks the kernel for a signal when its parent goes, then runs the module as
`python -m` would. Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
from pathlib import Path

from sparseforge_core.files import write_text

PR_SET_PDEATHSIG = 1
ENDINGS = "SPARSEFORGE_RANK_ENDINGS"
"""Environment variable: the folder for `rank-N.json`."""


def main() -> int:
    """Run the module that the arguments name; its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # torchrun was gone before we asked
        return 1
    record = Path(os.environ[ENDINGS]) / f"rank-{os.environ['RANK']}.json"
    write_text(record, json.dumps({"pid": os.getpid()}))
    sys.argv = sys.argv[1:]
    code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        write_text(record, json.dumps({"pid": os.getpid(), "code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The `sparseforge` command with the soak's grid.

python -m tests.soak.command run soak
"""

from __future__ import annotations

import sys

from tests.soak.grid import register

if __name__ == "__main__":
    from flows.cli import main

    register()
    sys.exit(main())

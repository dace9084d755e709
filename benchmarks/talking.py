"""What a benchmark of `sparseforge bench` says, and where: lines for people, or rows for programs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def talking(options: argparse.Namespace) -> Iterator[None]:
    """Lines go to standard output; to standard error with --json, so that rows stand alone; nowhere with --quiet."""
    with contextlib.ExitStack() as places:
        if options.quiet:
            places.enter_context(contextlib.redirect_stdout(places.enter_context(open(os.devnull, "w"))))
        elif options.json:
            places.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield

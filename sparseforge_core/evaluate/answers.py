"""A model's answers to one task, one line an item, so that an interrupted evaluation goes on with the items left.

The file's first line says what the answers depend on; every line carries a checksum. What is damaged is reported and
answered again, never trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparseforge_core import files

log = logging.getLogger(__name__)

FORMAT = 2


class Answers:
    """The answers in one file, by item number; new ones are appended as they come."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """`about` is everything besides the item that determines an answer: task and harness versions, model, dtype."""
        self.path = path
        self.about = {"format": FORMAT, **about}
        self.known: dict[int, tuple[str, Any]] = {}
        self._load()
        self._file = path.open("a", encoding="utf-8")

    def get(self, item: int, asked: str) -> Any | None:
        """The stored answer to item number `item`, or None; `asked` is `digest` of what the item asks now."""
        if item not in self.known:
            return None
        stored, answer = self.known[item]
        if stored != asked:
            log.warning("%s: item %d now asks something else than was answered; it is answered again", self.path, item)
            return None
        return answer

    def put(self, item: int, asked: str, answer: Any) -> None:
        """Keep an answer; a process that dies now leaves it behind."""
        self.known[item] = (asked, answer)
        self._file.write(_line({"item": item, "asked": asked, "answer": answer}))
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _load(self) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []
        good = [record for record in map(_record, lines) if record is not None]
        if good and {k: v for k, v in good[0].items() if k != "check"} == self.about:
            for record in good[1:]:
                self.known[int(record["item"])] = (record["asked"], record["answer"])
            if len(good) == len(lines):
                return
            log.warning(
                "%s: %d of %d lines are damaged or cut off; their items are answered again",
                self.path, len(lines) - len(good), len(lines),
            )  # fmt: skip
        elif lines:
            log.warning("%s: its first line is damaged or of something else; every item is answered again", self.path)
        kept = ({"item": i, "asked": asked, "answer": answer} for i, (asked, answer) in sorted(self.known.items()))
        files.write_text(self.path, _line(self.about) + "".join(map(_line, kept)))


def remembered(
    folder: Path,
    name: str,
    about: dict[str, Any],
    asked: Sequence[str],
    run: Callable[[list[int]], Iterator[dict[int, Any]]],
) -> list[Any]:
    """The answer to each of `asked`, those that `folder` does not hold from `run`, which gives them as they come.

    `run` gets the numbers of what is left, at least one, and yields answers by number; each is kept at once.
    """
    path = folder / file_name(name, about)
    with files.only_one(path):
        answers = Answers(path, about)
        try:
            left = [item for item, text in enumerate(asked) if answers.get(item, text) is None]
            for found in run(left) if left else ():  # all may be there: killed between the last and the numbers
                for item, answer in found.items():
                    answers.put(item, asked[item], answer)
            return [answers.known[item][1] for item in range(len(asked))]
        finally:
            answers.close()


def digest(asked: Any) -> str:
    """12 hex digits over what an item asks."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:12]


def file_name(task: str, about: dict[str, Any]) -> str:
    """`<task>-<8 hex>.jsonl`: answers that depend on other things live in another file."""
    return f"{task}-{digest({'format': FORMAT, **about})[:8]}.jsonl"


def _line(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return json.dumps({**body, "check": hashlib.sha256(text.encode()).hexdigest()[:8]}, sort_keys=True) + "\n"


def _record(line: str) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    if not isinstance(body, dict) or _line({k: v for k, v in body.items() if k != "check"}) != line + "\n":
        return None
    return body

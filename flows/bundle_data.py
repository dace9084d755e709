"""What a bundle carries of data: the files of corpora, tokenizers, items of benchmark tasks, the WikiText-2 test set.

Prompts, choices and metrics of a task are lm-eval's and stay there; only the items that it would fetch are carried.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sparseforge_core import bundles, files
from sparseforge_core.data.corpora import Corpus, TextFiles
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.benchmarks import local_items, offline_items
from sparseforge_core.evaluate.suites import WIKITEXT_ENV, PerplexitySuite, Suite
from sparseforge_core.models.sources import TokenizerDir


def copy_corpora(folder: Path, corpora: Iterable[Corpus]) -> None:
    """The local files of corpora, each of which must be the one in the recipe. Raises DataError otherwise."""
    for corpus in corpora:
        if not isinstance(corpus, TextFiles):
            continue
        for path, source in zip(corpus.paths, corpus.checked(), strict=True):
            if is_carried(path):
                target = folder / bundles.DATA / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def is_carried(path: str) -> bool:
    """Whether a file that a recipe names lies in the data folder, which is what travels."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def copy_tokenizers(folder: Path, tokenizers: Iterable[TokenizerDir]) -> None:
    """The files of tokenizers in the data folder. Raises DataError for one that is not the recipe's."""
    for tokenizer in tokenizers:
        if is_carried(tokenizer.path):
            target = folder / bundles.DATA / tokenizer.path / "tokenizer.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tokenizer.checked(), target)


def copy_measured(folder: Path, suites: Iterable[Suite]) -> None:
    """Items of the suites' tasks, as many as they ask for, and WikiText-2 from $SPARSEFORGE_WIKITEXT2.

    What is not at hand here is left out: it has to be on the other machine. Raises DataError for items that are at hand
    and cannot be read.
    """
    wanted: dict[str, int | None] = {}
    for suite in suites:
        limit = getattr(suite, "limit", None)
        for task in getattr(suite, "tasks", ()):
            known = wanted.get(task, 0)
            wanted[task] = None if limit is None or known is None else max(known, limit)
        if isinstance(suite, PerplexitySuite) and suite.text == "wikitext2" and os.environ.get(WIKITEXT_ENV):
            _copy_wikitext(folder)
    for task, count in wanted.items():  # keys stay in order: lm-eval's hash of an item depends on it
        for split, rows in _items(task).items():
            lines = "".join(json.dumps(row) + "\n" for row in rows[:count])
            files.write_text(folder / bundles.TASKS / task / f"{split}.jsonl", lines)


def _items(task: str) -> dict[str, tuple[dict[str, object], ...]]:
    """The items of a task by split, from where its evaluation here would take them; none where it would ask the hub."""
    local = local_items(task)
    if local is not None:
        return local
    packaged = offline_items(task)
    return {} if packaged is None else {packaged[0]: packaged[1]}


def _copy_wikitext(folder: Path) -> None:
    source = Path(os.environ[WIKITEXT_ENV]) / bundles.WIKITEXT_FILE
    if not source.is_file():
        raise DataError(f"{WIKITEXT_ENV}={source.parent}: there is no {source.name} in it")
    target = folder / bundles.WIKITEXT / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)

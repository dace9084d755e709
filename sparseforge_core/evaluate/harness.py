"""Zero-shot accuracy by lm-eval's stock tasks. The only door to lm_eval.

Results are kept item by item and cached by task inside the cell's own folder: a second suite that shares tasks with
a first reads them, and an interrupted evaluation goes on with the next task. lm-eval's own cache is keyed by the
request alone and would hand one model's answers to another; it is never used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from sparseforge_core import files
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.benchmarks import PACKAGE, offline_items
from sparseforge_core.evaluate.result import SuiteResult, measurement
from sparseforge_core.evaluate.suites import HarnessSuite

log = logging.getLogger(__name__)

STOCK = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "race": "race/race.yaml",
    "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""The stock definition of each task inside lm-eval."""

BOOTSTRAP = 1000


def zero_shot(
    model: Any, tokenizer: Any, suite: HarnessSuite, *, items_dir: Path, device: torch.device, batch_size: int
) -> SuiteResult:
    """acc and acc_norm of each task of the suite, and the unweighted mean of acc.

    Raises DataError naming a task whose items cannot be had.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    items: list[dict[str, Any]] = []
    for task in suite.tasks:
        path = items_dir / f"{task}-{_cache_key(task, suite.limit, dtype)}.jsonl"
        if not path.is_file():
            found = _run_task(model, tokenizer, task, suite.limit, device, batch_size)
            files.write_text(path, "".join(json.dumps(item, sort_keys=True) + "\n" for item in found))
        items += [json.loads(line) for line in path.read_text().splitlines()]
    context = {"harness_version": lm_eval.__version__, "batch_size": batch_size, "dtype": dtype}
    return SuiteResult(measurements=tuple(_summaries(suite, items)), items=tuple(items), context=context)


def _cache_key(task: str, limit: int | None, dtype: str) -> str:
    text = json.dumps([task, limit, dtype, lm_eval.__version__, 1])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def _task(name: str, limit: int | None) -> tuple[Any, str]:
    """(stock task over the first `limit` items at hand, split). Prompts, choices and metrics are lm-eval's own."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    config: dict[str, Any] = dict(load_yaml(folder / STOCK[name], resolve_func=True))
    config.pop("tag", None)
    local = offline_items(name)
    if local is None:
        return _hub_task(name, config), str(config.get("test_split") or config["validation_split"])
    split, documents = local
    import datasets

    datasets.disable_progress_bars()
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(list(documents[:limit]))})
    wanted = {"validation_split": None, "test_split": None, "training_split": None, f"{split}_split": split}
    config = {**config, **wanted, "custom_dataset": lambda **_: data}
    return ConfigurableTask(config=config), split


def _hub_task(name: str, config: dict[str, Any]) -> Any:
    try:
        return ConfigurableTask(config=config)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"task {name}: its items are not in {PACKAGE} and the hub cannot be reached "
            f"({(str(error).splitlines() or [''])[0][:160]}); use a suite without {name}, such as cast-6 for cast-7"
        ) from error


def _run_task(
    model: Any, tokenizer: Any, name: str, limit: int | None, device: torch.device, batch_size: int
) -> list[dict[str, Any]]:
    """One record per item: answers, correctness, log-likelihoods."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    task, split = _task(name, limit)
    positions = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
    wrapped = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=positions, device=str(device)
    )
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=[task],
        task_manager=_manager(),
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
        verbosity="ERROR",
    )
    if results is None:
        raise DataError(f"task {name}: lm-eval returned nothing")
    samples = results["samples"][name]
    version = results["versions"][name]
    return [_record(name, split, version, sample) for sample in samples]


@functools.cache
def _manager() -> TaskManager:
    # The default manager indexes every task of the harness, which takes ten seconds and is not needed here.
    return TaskManager(include_defaults=False)


def _record(task: str, split: str, version: Any, sample: dict[str, Any]) -> dict[str, Any]:
    likelihoods = [float(response[0][0]) for response in sample["resps"]]
    finite = all(math.isfinite(value) for value in likelihoods)
    record = {
        "task": task,
        "task_version": str(version),
        "split": split,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "target": str(sample["target"]),
        "loglikelihoods": likelihoods if finite else None,
        "acc": float(sample["acc"]) if finite else None,
    }
    if "acc_norm" in sample:
        record["acc_norm"] = float(sample["acc_norm"]) if finite else None
    return record


def _summaries(suite: HarnessSuite, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows, means, variances, count = [], [], [], 0
    for task in suite.tasks:
        own = [item for item in items if item["task"] == task]
        about = {"task_version": own[0]["task_version"], "split": own[0]["split"], "limit": suite.limit}
        for metric in ("acc", "acc_norm"):
            values = [item[metric] for item in own if metric in item]
            if values:
                mean, error = _mean(values)
                rows.append(measurement(f"{task}/{metric}", mean, error, len(values), about))
                if metric == "acc":
                    means.append(mean)
                    variances.append(None if error is None else error**2)
                    count += len(values)
    known = [value for value in means if value is not None]
    overall = sum(known) / len(means) if len(known) == len(means) else None
    spread = [value for value in variances if value is not None]
    error = math.sqrt(sum(spread)) / len(means) if len(spread) == len(means) else None
    rows.append(measurement("mean/acc", overall, error, count, {"tasks": list(suite.tasks), "limit": suite.limit}))
    return rows


def _mean(values: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error; both None if an item has no answer (the model diverged)."""
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None, None
    mean = sum(known) / len(known)
    if len(known) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1) / len(known))

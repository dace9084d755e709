"""Items per second of our evaluation against stock lm-eval, same model, tasks and batch size, in one run.

python benchmarks/evaluation.py [--model tiny] [--limit 16] [--json]

For each task, stock `lm_eval.simple_evaluate` on lm-eval's own `HFLM` and our `PackedLM` answer the same items, one
after the other; the answers are compared item by item. Three ratios are printed: of the whole calls; of the time spent
inside the model interface alone, which leaves out what `simple_evaluate` does besides (it collects facts about the
machine); and on a CPU, of the processor time inside, which other work on the machine does not disturb. Exit code 1 if
an answer differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for name, value in {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.evaluate.harness import run_task
from sparseforge_core.evaluate.packed_lm import PackedLM
from sparseforge_core.evaluate.stock_tasks import stock_task
from sparseforge_core.evaluate.suites import ZERO_SHOT_7
from sparseforge_core.models import hub
from sparseforge_core.models.sources import ModelSource, Packaged, Tiny, TrainedBPE

MODELS: dict[str, ModelSource] = {
    "smollm2-135m": Packaged(name="smollm2-135m"),
    "tiny": Tiny(architecture="llama", tokenizer=TrainedBPE(corpus=Synthetic(), size=300), positions=1024),
}


def timed(lm: Any) -> list[tuple[float, float]]:
    """Make `lm` add the (wall, processor) seconds of each of its calls to the list that is returned."""
    seconds: list[tuple[float, float]] = []
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        inner = getattr(lm, method)

        def outer(requests: Any, _inner: Any = inner, **options: Any) -> Any:
            began = time.perf_counter(), time.process_time()
            try:
                return _inner(requests, **options)
            finally:
                seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))

        setattr(lm, method, outer)
    return seconds


def stock(lm: HFLM, task: Any, limit: int | None) -> list[dict[str, Any]]:
    """lm-eval's samples of a task."""
    results: Any = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task.task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    return list(results["samples"][task.name])


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> tuple[int, float]:
    """(items whose answer or metric differs, largest difference of a log-likelihood in nats)."""
    differing, largest = 0, 0.0
    for a, b in zip(theirs, ours, strict=True):
        assert a["doc_hash"] == b["doc_hash"]
        values = [float(response[0][0]) for response in a["resps"]]
        same = all(float(a[metric]) == b[metric] for metric in ("acc", "acc_norm") if metric in a)
        if "chosen" in b:
            same = same and max(range(len(values)), key=values.__getitem__) == b["chosen"]
        differing += not same
        largest = max([largest, *(abs(x - y) for x, y in zip(values, b["loglikelihoods"], strict=True))])
    return differing, largest


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(ZERO_SHOT_7.tasks))
    parser.add_argument("--limit", type=int, default=16, help="items of each task; 0 takes all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    home, limit = Path(tempfile.mkdtemp(prefix="sparseforge-benchmark-")), options.limit or None
    source = MODELS[options.model]
    model: Any = hub.load_model(source, home).to(options.device, getattr(torch, options.dtype)).eval()
    tokenizer = hub.load_tokenizer(source, home)
    fast = PackedLM(model, tokenizer, device=torch.device(options.device), batch_size=options.batch_size)
    plain = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        max_length=fast.max_length,
        device=options.device,
    )
    opened = [stock_task(task, limit) for task in options.tasks]
    warm = stock_task(options.tasks[0], 2)
    stock(plain, warm, 2), run_task(fast, warm, 2)
    inside = {"stock": timed(plain), "ours": timed(fast)}
    rows = [measure(task, limit, plain, fast, inside) for task in opened]
    rows.append(total(rows))
    for row in rows:
        row["ratio"] = row["stock_seconds"] / row["our_seconds"]
        row["ratio_inside"] = row["stock_inside"] / row["our_inside"]
        row["ratio_processor"] = row["stock_processor"] / row["our_processor"]
    body = {
        "model": options.model,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "lm_eval": lm_eval.__version__,
        "rows": rows,
    }
    print(json.dumps(body, indent=1) if options.json else table(body))
    return int(rows[-1]["differing"] > 0)


def measure(task: Any, limit: int | None, plain: Any, fast: Any, inside: dict[str, Any]) -> dict[str, Any]:
    """One task under both."""
    began = time.perf_counter()
    theirs = stock(plain, task, limit)
    middle = time.perf_counter()
    ours = run_task(fast, task, limit)
    ended = time.perf_counter()
    differing, largest = compare(theirs, ours)
    return {
        "task": task.name,
        "items": len(ours),
        "differing": differing,
        "largest_difference": largest,
        "stock_seconds": middle - began,
        "our_seconds": ended - middle,
        "stock_inside": inside["stock"][-1][0],
        "our_inside": inside["ours"][-1][0],
        "stock_processor": inside["stock"][-1][1],
        "our_processor": inside["ours"][-1][1],
    }


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All tasks together."""
    names = ("items", "differing", "stock_seconds", "our_seconds", "stock_inside", "our_inside")
    names += ("stock_processor", "our_processor")
    row = {"task": "overall", **{name: sum(row[name] for row in rows) for name in names}}
    row["largest_difference"] = max(r["largest_difference"] for r in rows)
    return row


def table(body: dict[str, Any]) -> str:
    """A screen of text."""
    about = ", ".join(f"{name} {value}" for name, value in body.items() if name != "rows")
    lines = [
        about,
        f"{'task':<16}{'items':>7}{'stock/s':>10}{'ours/s':>10}{'ratio':>8}{'inside':>8}{'differ':>8}  nats",
    ]
    for row in body["rows"]:
        lines.append(
            f"{row['task']:<16}{row['items']:>7}{row['items'] / row['stock_seconds']:>10.2f}"
            f"{row['items'] / row['our_seconds']:>10.2f}{row['ratio']:>8.2f}{row['ratio_inside']:>8.2f}"
            f"{row['ratio_processor']:>8.2f}{row['differing']:>8}  {row['largest_difference']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

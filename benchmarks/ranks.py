"""Several GPUs against one: the same training, how much faster, resumed after a kill, and a 7B shape against its plan.

python benchmarks/ranks.py [--out DIR] [--small] [--quick] [--only {agreement,speed}] [--lost]

With `--lost` it only kills a rank of a running training and says how soon the launcher is back. Otherwise it starts
itself: one process a GPU for what one GPU does, then torchrun on two GPUs. Every part is measured for itself; one that
fails prints its traceback and the others go on. DIR gets `ranks.json` (measures) and `placement.json` (rates that
`sparseforge plan --memory` reads). `--small` is the same on the CPU with tiny shapes, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
"""Before torch is imported, which takes its part of `--seconds`."""

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.train import commit
from flows.launching import launch
from sparseforge_core import distributed, memory, ranks
from sparseforge_core.data.corpora import Synthetic
from sparseforge_core.execution import Execution
from sparseforge_core.identity import dumps
from sparseforge_core.methods.base import Surroundings
from sparseforge_core.methods.sparseforge import SparseForge
from sparseforge_core.models.families import family_of
from sparseforge_core.models.hub import from_config
from sparseforge_core.models.regions import compile_blocks
from sparseforge_core.models.sites import assign_patterns, find_sites
from sparseforge_core.models.sources import Tiny, TrainedBPE
from sparseforge_core.objective import Distill, faster, forwards
from sparseforge_core.objective import batch as objective_batch
from sparseforge_core.rank_checkpoint import RankCheckpoints
from sparseforge_core.recipe import Cell, Recipe, TrainPlan
from sparseforge_core.run import train_cell
from sparseforge_core.schedules import WarmupLinear
from sparseforge_core.sparsity.patterns import nm
from sparseforge_core.tracking.tracker import NullTracker, read_journal
from sparseforge_core.train import parallel
from sparseforge_core.train.loop import Run, train
from sparseforge_core.train.optimizer import build_optimizer

GPUS = 2
ROOM = 40e9
"""Bytes that finished models and checkpoints may take; where memory has them to spare, no disk is waited for."""
KILLED_AT = 54
"""Step at which rank 1 kills itself; a checkpoint is written after step 50."""
ANNEALED = SparseForge()
CHUNK_LOGITS = 2**27
"""Logits of a chunk here: smaller chunks leave a GPU waiting for its host, on one GPU as on two."""


ALL = [
    ["gathering", "speed:replicate", "train:replicate-few", "train:replicate-whole", "kill:replicate-cut"],
    ["train:replicate-cut", "speed:shard", "train:shard-few", "seven", "train:shard-whole", "kill:shard-cut"],
    ["train:shard-cut"],
]
QUICK = [
    ["speed:replicate", "train:replicate-few", "seven", "train:shard-whole", "kill:shard-cut"],
    ["train:shard-cut", "train:shard-few"],
]
"""Parts by launch on two GPUs; a launch ends with the death of a rank, but for the last."""
AGREEMENT = [["train:replicate-few", "train:shard-whole", "kill:shard-cut"], ["train:shard-cut", "train:shard-few"]]
SPEED = [["speed:replicate", "speed:shard", "speed:shard-plain", "seven", "seven:plain"]]
"""The same for `--only agreement` and `--only speed`."""
LAST_SECONDS = 8.0
"""What the last launch needs once it is there."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    cell: dict[str, int]
    """Trained a few steps on one GPU and on two."""
    killed: dict[str, int]
    """Trained longer, killed and resumed."""
    cell_batch: tuple[int, int]
    speed: dict[str, Any]
    speed_batch: tuple[int, int]
    seven: dict[str, Any]
    seven_batch: tuple[int, int]
    seven_steps: int
    documents: int


LARGE = Sizes(
    cell={"width": 768, "layers": 17, "heads": 12, "positions": 512},
    killed={"width": 256, "layers": 4, "heads": 4, "positions": 512},
    cell_batch=(8, 256),
    speed={
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    speed_batch=(32, 1024),
    seven={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    seven_batch=(1, 4096),
    seven_steps=22,
    documents=4000,
)
SMALL = Sizes(
    cell={"width": 64, "layers": 2, "heads": 2, "positions": 64},
    killed={"width": 64, "layers": 1, "heads": 2, "positions": 64},
    cell_batch=(4, 32),
    speed={**LARGE.speed, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320},
    speed_batch=(2, 32),
    seven={**LARGE.seven, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 20000},
    seven_batch=(1, 32),
    seven_steps=22,
    documents=100,
)


def cell(sizes: Sizes, where: str) -> Cell:
    """What is trained in the folder `where`: all phases of an annealing, in float32."""
    short = where.endswith("-few")
    tokenizer = TrainedBPE(corpus=Synthetic(documents_count=50), size=300)
    return Cell(
        recipe=Recipe(
            model=Tiny(architecture="llama", tokenizer=tokenizer, **(sizes.cell if short else sizes.killed)),
            method=SparseForge(update_every=2 if short else 5),
            corpus=Synthetic(documents_count=sizes.documents),
            pattern=nm(2, 4),
            objective=Distill(),
            train=TrainPlan(
                steps=20 if short else 60,
                sequences=sizes.cell_batch[0],
                length=sizes.cell_batch[1],
                lr=WarmupLinear(peak=3e-4),
            ),
        )
    )


class RandomStream:
    """Random tokens as a function of (step, row), in place of a corpus."""

    def __init__(self, vocabulary: int, sequences: int, length: int) -> None:
        self.vocabulary, self.sequences, self.length = vocabulary, sequences, length

    def batch(self, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Token ids of a step, this rank's rows."""
        share = self.sequences // world
        source = torch.Generator().manual_seed(step * 10_007 + rank)
        return torch.randint(0, self.vocabulary, (share, self.length), generator=source)


def loop(
    config: dict[str, Any],
    batch: tuple[int, int],
    sharding: str,
    steps: int,
    *,
    recompute: bool = False,
    plain: bool = False,
    method: SparseForge = ANNEALED,
) -> dict[str, float]:
    """Seconds of a step in the heat of an annealing, after ten to warm up, and the peak of memory after placement.

    Blocks are compiled and the head's losses fused, as a long run's are on a GPU, unless `plain`.
    """
    import transformers

    device, world = ranks.own_device(), distributed.world()
    objective_batch.CHUNK_LOGITS = CHUNK_LOGITS
    made = transformers.LlamaConfig(**config, max_position_embeddings=batch[1])
    torch.manual_seed(0)
    with device:  # a model of this size fits before it is sharded, and random weights are made fast there
        model: Any = from_config(made).eval()
        teacher: Any = from_config(made, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    teacher.requires_grad_(False)
    sites = assign_patterns(find_sites(model, family_of("llama")), nm(2, 4))
    method = replace(method, quench_begin=0.97, freeze_at=0.99, update_every=10)
    plan = TrainPlan(
        steps=steps,
        sequences=batch[0] * world,
        length=batch[1],
        compute_dtype="bfloat16" if device.type == "cuda" else "float32",
    )
    track = method.start(Surroundings(model=model, sites=sites, slorb=None, steps=steps, calibration=lambda n, m: []))
    forward, taught = forwards(model, teacher)
    if device.type == "cuda" and not plain:
        forward, taught = faster(forward, taught, compiled=sharding != "shard")
        if sharding == "shard":
            compile_blocks(model)
            compile_blocks(teacher)
    if recompute:
        parallel.recompute_activations(model)
    how = parallel.Ranks()
    if sharding == "shard":
        root = parallel.shard(model, sites, device)
        forward, taught = parallel.inside(root, forward), parallel.inside(parallel.shard(teacher, [], device), taught)
        track.placed()
        how = parallel.Shards()
    elif sharding == "replicate":
        how = parallel.Replicas(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    recipe = Recipe(
        model=cell(SMALL, "").recipe.model,
        method=method,
        corpus=Synthetic(),
        pattern=nm(2, 4),
        objective=Distill(),
        train=plan,
    )
    times: list[float] = []
    losses: list[float] = []

    def seen(progress: Any) -> None:
        synchronize()
        times.append(time.perf_counter())
        losses.append(progress.loss)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            recipe=recipe,
            model=model,
            forward=forward,
            teacher=taught,
            track=track,
            optimizer=build_optimizer(model, sites, plan, track),
            stream=RandomStream(made.vocab_size, plan.sequences, plan.length),  # type: ignore[arg-type]
            checkpoints=RankCheckpoints(Path(folder), "benchmark"),
            tracker=NullTracker(),
            device=device,
            ranks=how,
            save_every=steps + 1,
            histogram_every=steps + 1,
        )
        train(run, on_step=seen)
    last = 10 * ((steps - 2) // 10)  # whole periods of mask updates, before the quench
    seconds = (times[last - 1] - times[9]) / (last - 10)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    tokens = plan.sequences * plan.length
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": float(peak),
        "reserved_bytes": float(reserved),
        "steps": float(len(times)),
        "last_loss": losses[-1],
    }


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of `work`, the least of a few."""
    work()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def costs(sizes: Sizes) -> dict[str, float]:
    """What one block of the 7B shape costs on one GPU: rates of operations, seconds a weight, bytes a token."""
    import transformers

    device = ranks.own_device()
    made = transformers.LlamaConfig(**{**sizes.seven, "num_hidden_layers": 2}, max_position_embeddings=4096)
    with device:
        model: Any = from_config(made).eval()
        teacher: Any = from_config(made, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    teacher.requires_grad_(False)
    sites = assign_patterns(find_sites(model, family_of("llama")), nm(2, 4))
    track: Any = SparseForge().start(
        Surroundings(model=model, sites=sites, slorb=None, steps=100, calibration=lambda n, m: [])
    )
    count, length = sizes.seven_batch
    tokens = torch.randint(0, made.vocab_size, (count, length), device=device)
    masked = sum(site.weight.numel() for site in sites)
    forward_flops = (2.0 * masked + 4.0 * 2 * made.hidden_size * length / 2) * tokens.numel()
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    def student() -> None:
        with precision:
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    def taught() -> None:
        with torch.no_grad():
            teacher.model(input_ids=tokens, use_cache=False)

    found = {"train_flops_per_second": 3.0 * forward_flops / timed(student)}
    found["teacher_flops_per_second"] = forward_flops / timed(taught)
    optimizer = torch.optim.AdamW([p for p in model.model.layers.parameters() if p.requires_grad], lr=0.0, fused=True)
    found["optimizer_seconds_per_weight"] = timed(optimizer.step, 3) / masked
    track.curvature.observe(_gradients(sites))
    track.step = 10
    found["update_seconds_per_weight"] = timed(lambda: track._update_masks(10), 2) / masked
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        with precision:
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        kept = torch.cuda.memory_allocated() - before - 2 * masked  # the effective weights in bfloat16
        found["activation_bytes_per_token_and_block"] = kept / 2 / tokens.numel()
        found["planned_activation_bytes_per_token_and_block"] = 40.0 * made.hidden_size + 8.0 * made.intermediate_size
        del hidden
    return found


def _gradients(sites: list[Any]) -> Any:
    """A batch of which the estimator looks at the gradients alone, which the sites have."""
    from sparseforge_core.observe.curvature import Batch

    nothing: Any = None
    where = sites[0].weight.device
    return Batch(
        step=1,
        model=nothing,
        tokens=torch.zeros(1, 1, device=where),
        loss=nothing,
        predictions=nothing,
        optimizer=nothing,
    )


def gathering(sizes: Sizes) -> float:
    """Bytes that a GPU takes in a second while it gathers tensors of a block's size."""
    mine = torch.zeros(2**20 if sizes is SMALL else 2**28, device=ranks.own_device())
    whole = torch.empty(mine.numel() * distributed.world(), device=mine.device)
    seconds = timed(lambda: torch.distributed.all_gather_into_tensor(whole, mine), 3)
    return (distributed.world() - 1) * mine.numel() * 4 / seconds


def curve(folder: Path) -> dict[int, float]:
    """Journalled losses by step."""
    rows = read_journal(folder / "journal.jsonl")[0]
    return {row["step"]: row["scalars"]["loss/total"] for row in rows if "scalars" in row}


@functools.cache  # of cells that are finished, which are asked for again and again
def compared(one: Path, other: Path) -> dict[str, float]:
    """Greatest relative difference of losses, share of mask entries that agree, and whether all weights are equal."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    losses, others = curve(one), curve(other)
    same = total = 0
    for name, weight in ours.items():
        if weight.ndim == 2 and "embed" not in name and "head" not in name:
            same += int(((weight == 0) == (theirs[name] == 0)).sum())
            total += weight.numel()
    return {
        "loss": max(abs(losses[s] - others[s]) / abs(losses[s]) for s in losses),
        "masks": same / total,
        "equal": float(losses == others and all(torch.equal(ours[name], theirs[name]) for name in ours)),
    }


class Work:
    """The parts that one process, or one rank of several, is asked for."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    def do(self, part: str) -> Any:
        """One part by its name; what it returns is JSON."""
        name, _, argument = part.partition(":")
        return getattr(self, name)(*([argument] if argument else []))

    def train(self, where: str) -> str:
        """Train the cell in the folder of this name, sharded as the name begins."""
        sharding: Any = where.partition("-")[0]
        execution = Execution(sharding=sharding, deterministic=not where.endswith("-few"))
        made = train_cell(cell(self.sizes, where), self.folder / where, self.folder / "home", execution=execution)
        return str(made)

    def kill(self, where: str) -> None:
        """The same, but rank 1 kills itself on the way."""

        def deadly(progress: Any) -> None:
            if progress.step == KILLED_AT and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if progress.step == KILLED_AT:  # what torchrun and our beats would do to it too, but later
                threading.Timer(3.0, os._exit, (1,)).start()

        execution = Execution(sharding=where.partition("-")[0], deterministic=True)  # type: ignore[arg-type]
        home = self.folder / "home"
        train_cell(cell(self.sizes, where), self.folder / where, home, execution=execution, on_step=deadly)

    def speed(self, way: str) -> dict[str, float]:
        """The small model's step, spread as the way begins."""
        sharding, _, how = way.partition("-")
        return loop(self.sizes.speed, self.sizes.speed_batch, sharding, 32, plain=how == "plain")

    def seven(self, how: str = "") -> dict[str, float]:
        """The 7B shape, sharded."""
        sizes = self.sizes
        return loop(sizes.seven, sizes.seven_batch, "shard", sizes.seven_steps, recompute=True, plain=how == "plain")

    def costs(self) -> dict[str, float]:
        """Rates of one GPU."""
        return costs(self.sizes)

    def gathering(self) -> float:
        """Rate between GPUs."""
        return gathering(self.sizes)


def work(parts: list[str], folder: Path, sizes: Sizes, label: str, after: Path | None) -> int:
    """Do the parts one after the other, from when the file `after` is there; rank 0 writes each one's result."""
    if ranks.launched() > 1:
        ranks.join(wait=30.0)
    while after is not None and not after.exists():
        time.sleep(0.05)
    doing = Work(folder, sizes)
    for part in parts:
        began = time.perf_counter()
        try:
            result = {"result": doing.do(part)}
        except Exception:  # noqa: BLE001 (whatever one part meets, the others are still worth measuring)
            traceback.print_exc()  # what fails on all ranks alike leaves them in step with each other
            result = {"error": traceback.format_exc()}
        gc.collect()  # what a part leaves must not count as the next one's memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if distributed.rank() == 0:
            name = f"{label}.{part.replace(':', '.')}"
            (folder / f"{name}.json").write_text(json.dumps(result))
            print(f"[{name}] {time.perf_counter() - began:.1f} s {json.dumps(result)[:300]}", flush=True)
    ranks.leave()
    return 0


def start(parts: list[str], folder: Path, options: argparse.Namespace, *, gpu: int | None, label: str) -> Any:
    """A process on one GPU, or torchrun on all of them, that does these parts."""
    program = [str(Path(__file__)), "--work", *parts, "--folder", str(folder), "--label", label]
    program += ["--after", str(folder / f"{label}.go")] if gpu is None else []
    program += ["--small"] if options.small else []
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONWARNINGS": "ignore"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, *program]
    if gpu is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={GPUS}", *program]
        environment["OMP_NUM_THREADS"] = "1" if options.small else "8"
    elif not options.small:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[gpu]
    print(f"-- {label}: {' '.join(parts)}", flush=True)
    return subprocess.Popen(command, env=environment)


def drive_lost(options: argparse.Namespace) -> int:
    """Kill rank 1 of a training under the product's launcher, and write how long the launcher then takes to be back."""
    sizes = SMALL if options.small else LARGE
    made = cell(sizes, "lost")
    plan = dataclasses.replace(made.recipe.train, steps=20_000)
    made = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, train=plan))
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "cell.json").write_text(dumps(made))
        journal = folder / "train" / "journal.jsonl"

        def tick() -> None:
            if not killed and journal.is_file() and len(journal.read_text().splitlines()) >= 5:
                pid = json.loads((folder / "ranks" / "endings" / "rank-1.json").read_text())["pid"]
                killed.append(time.monotonic())
                os.kill(pid, signal.SIGKILL)

        over = STARTED + options.seconds
        program = ["sparseforge_core.run", "--home", str(folder / "home"), "train"]
        program += [str(folder / "cell.json"), str(folder / "train"), "--sharding", "shard"]
        ending = launch(
            program, GPUS, folder / "ranks", lambda: time.perf_counter() > over, tick=tick, stop_seconds=5.0
        )
        back = time.monotonic()
        if not killed or ending.done:
            print(ending.log.read_text()[-3000:], flush=True)
            return 1
    rows = [
        ("lost_rank_seconds", back - killed[0], "s from the kill of one of 2 ranks until the launcher is back", 15.0)
    ]
    show(put(rows, options, "--lost"))
    return 0


def drive(options: argparse.Namespace) -> int:
    """Start everything in order and write what was found, as it is found."""
    began = STARTED
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > ROOM and not options.small
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as temporary:
        folder = Path(temporary)
        one = ["speed:none"] if options.quick or options.only else ["speed:none", "costs"]
        alone = []
        if options.only != "agreement":
            alone.append(start(one, folder, options, gpu=0, label="one"))
        if options.only != "speed":
            alone.append(start(["train:none-few", "train:none-whole"], folder, options, gpu=1, label="one"))
        launches = {"agreement": AGREEMENT, "speed": SPEED}.get(options.only, QUICK if options.quick else ALL)
        # Starting takes as long as many a part: the next launch gets ready while the one before it is at work.
        following = start(launches[0], folder, options, gpu=None, label="two0")
        for process in alone:
            _wait(process, began, options.seconds, lambda: write(folder, options))
        for number, parts in enumerate(launches):
            process = following
            (folder / f"two{number}.go").touch()
            last = number == len(launches) - 1
            if not last:
                _wait_for(folder / f"two{number}.{parts[len(parts) // 2 - 1].replace(':', '.')}.json", process)
                following = start(launches[number + 1], folder, options, gpu=None, label=f"two{number + 1}")
            # The last launch resumes what was killed in the ones before it: it gets its share of the time.
            until = options.seconds if last else options.seconds - LAST_SECONDS
            _wait(process, began, until, lambda: write(folder, options))
            show(write(folder, options))
            print(f"-- {time.perf_counter() - began:.0f} s so far", flush=True)
        show(write(folder, options))
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    """Print the measures found so far."""
    for row in rows:
        print(f"{row['measure']:<44} {row['value']:>16.6g} {row['unit']:<28} bar {row['bar']}", flush=True)


def _wait_for(path: Path, process: Any) -> None:
    """Wait for a file, or for the end of who is to write it."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.1)


def _wait(process: Any, began: float, seconds: float, meanwhile: Callable[[], object]) -> None:
    """Wait for a process until so much time has passed since the beginning; every few seconds do something else."""
    while process.poll() is None:
        left = seconds - (time.perf_counter() - began)
        if left <= 0:
            process.terminate()  # torchrun then ends its ranks
            print("-- out of time", flush=True)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left, 3.0))
        meanwhile()


def write(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The measures that can be told from what is in `folder`, also written to the output folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        said = json.loads(path.read_text())
        if "result" in said:
            found[path.stem.partition(".")[2]] = said["result"]
    rows: list[tuple[str, float, str, float | None]] = []

    def add(measure: str, value: float, unit: str, bar: float | None = None) -> None:
        rows.append((measure, value, unit, bar))

    one = found.get("speed.none")
    plain = found.get("speed.shard-plain")
    if plain:
        add("two_gpu_tokens_per_second.shard.plain", plain["tokens_per_second"], "tokens/s, neither compiled nor fused")
    for sharding in ("replicate", "shard"):
        two = found.get(f"speed.{sharding}")
        if one and two:
            ratio = two["tokens_per_second"] / one["tokens_per_second"]
            add("two_gpu_speedup" if sharding == "replicate" else "two_gpu_speedup.shard", ratio, "ratio", 1.9)
            add(f"two_gpu_tokens_per_second.{sharding}", two["tokens_per_second"], "tokens/s")
            add(f"two_gpu_peak_gib.{sharding}", two["peak_bytes"] / memory.GIB, "GiB allocated on one GPU")
        whole, cut = folder / f"{sharding}-whole", folder / f"{sharding}-cut"
        for name in ("few", "whole"):
            ours, theirs = folder / f"none-{name}", folder / f"{sharding}-{name}"
            if finished(ours) and finished(theirs):
                same, what = compared(ours, theirs), "" if name == "few" else ".longer"
                add(f"two_gpu_loss_difference.{sharding}{what}", same["loss"], "relative, greatest of a run")
                add(f"two_gpu_mask_agreement.{sharding}{what}", same["masks"], "share of entries", 0.999)
        if finished(whole) and finished(cut):
            add(f"two_gpu_resume_bit_exact.{sharding}", compared(whole, cut)["equal"], "1: all weights, losses", 1.0)
    if one:
        add("one_gpu_tokens_per_second", one["tokens_per_second"], "tokens/s")
    if "seven" in found:
        sizes = SMALL if options.small else LARGE
        rows += seven_rows(found["seven"], sizes.seven, sizes.seven_batch, GPUS)
    if "seven.plain" in found:
        slow = found["seven.plain"]
        add("seven_b_shape.step_seconds.plain", slow["seconds"], "s, neither compiled nor fused")
        add("seven_b_shape.peak_gib.plain", slow["peak_bytes"] / memory.GIB, "GiB, neither compiled nor fused")
    how = f"--only {options.only}" if options.only else "--quick" if options.quick else ""
    listed, context = put(rows, options, how), context_of(options, how)
    rates = {name: value for name, value in found.get("costs", {}).items() if isinstance(value, float)}
    if "gathering" in found:
        rates["gather_bytes_per_second"] = found["gathering"]
    told = [{"measure": m, "value": v, "unit": m.split("_", 1)[1], "bar": None, **context} for m, v in rates.items()]
    if told:
        (options.out / "placement.json").write_text(json.dumps(told, indent=1) + "\n")
    return listed + told


def put(
    rows: list[tuple[str, float, str, float | None]], options: argparse.Namespace, how: str
) -> list[dict[str, Any]]:
    """The measures as they are kept, also written to the output folder."""
    context = context_of(options, how)
    listed = [{"measure": m, "value": v, "unit": u, "bar": b, **context} for m, v, u, b in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ranks.json").write_text(json.dumps(listed, indent=1) + "\n")
    return listed


def context_of(options: argparse.Namespace, how: str) -> dict[str, str]:
    """What every measure says of how it was made."""
    command = f"python benchmarks/ranks.py {how}".strip()
    return {"hardware": hardware(), "command": command, "commit": options.commit or commit()}


def finished(folder: Path) -> bool:
    """Whether a cell was trained to its end there."""
    return (folder / "measurements.json").is_file()


def seven_rows(
    found: dict[str, float], config: dict[str, Any], batch: tuple[int, int], gpus: int, measure: str = "seven_b_shape"
) -> list[tuple[str, float, str, float | None]]:
    """What `loop` found of a 7B shape on so many GPUs, beside what the plan says: measure, value, unit, bar."""
    shape = memory.decoder(
        "7B shape",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )
    spread = memory.Spread(gpus=gpus, micro_batch=batch[0], length=batch[1])
    return [
        (f"{measure}.layers", float(shape.layers), "of 32; the rest is the plan's arithmetic", None),
        (f"{measure}.steps", found["steps"], f"real steps, {gpus} GPUs, sharded, recomputed", 20.0),
        (f"{measure}.peak_gib", found["peak_bytes"] / memory.GIB, "GiB allocated on one GPU", None),
        (f"{measure}.reserved_gib", found["reserved_bytes"] / memory.GIB, "GiB reserved on one GPU", None),
        (f"{measure}.planned_gib", memory.need(shape, spread) / memory.GIB, "GiB by the plan", None),
        (f"{measure}.step_seconds", found["seconds"], "s", None),
        (f"{measure}.tokens_per_second", found["tokens_per_second"], f"tokens/s, {gpus} GPUs", None),
    ]


def hardware() -> str:
    """What this ran on."""
    if not torch.cuda.is_available():
        return f"CPU, torch {torch.__version__}"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the top."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "ranks-out")))
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--quick", action="store_true", help="what two minutes hold: no rates, one kind of resume")
    parser.add_argument("--only", choices=["agreement", "speed"], help="what two GPUs agree on, or how fast they are")
    parser.add_argument("--lost", action="store_true", help="only how soon a training ends once a rank is killed")
    parser.add_argument("--seconds", type=float, default=140.0, help="no part starts or goes on after that")
    parser.add_argument("--commit", default="", help="what the results are to say")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--after", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--label", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options.work, options.folder, SMALL if options.small else LARGE, options.label, options.after)
    return drive_lost(options) if options.lost else drive(options)


if __name__ == "__main__":
    sys.exit(main())

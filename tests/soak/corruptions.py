"""Every file that a run trusts, cut short or with one bit flipped: noticed, and mended by what the error says to do.

Whatever is damaged, the grid ends with the undisturbed run's results, or stops with a sentence that names what to
delete; never with other results.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.bundle import choose, write_bundle
from flows.ingesting import ingest
from sparseforge_core.errors import BundleError, CheckpointMismatch, DataError, Interrupted, SparseForgeError
from sparseforge_core.store.store import ResultStore
from tests.soak.grid import GRID
from tests.soak.world import Counts, Reference, World
from tests.there import run_there

ADVICE = re.compile(r"delete (/\S+?)(?: |;|$)")


@dataclass
class Scene:
    """A world in which some files are about to be trusted."""

    name: str
    world: World
    files: list[Path]
    """Relative to the world."""


def scenes(reference: Reference, scratch: Path) -> list[Scene]:
    """In the middle of a training; trained, not recorded; recorded, not evaluated; evaluated, not recorded."""
    key = _sparseforge(reference.world)
    found = []

    middle = World(scratch / "midway")
    middle.drain(until=lambda cell, stage: cell == key)
    steps: list[int] = []
    with_stop = {"on_step": lambda progress: steps.append(progress.step), "should_stop": lambda: len(steps) >= 55}
    with contextlib.suppress(Interrupted):
        _only(middle, key, "train", **with_stop)
    found.append(Scene("checkpoint", middle, _files(middle, f"cells/{key}/train/checkpoints")))

    trained = World(scratch / "trained")
    trained.drain(until=lambda cell, stage: cell == key)
    from sparseforge_core import run
    from sparseforge_core.identity import loads

    store = ResultStore(trained.home.store_url)
    cell = loads(store.cell_body(key))
    store.close()
    run.train_cell(cell, trained.root / "cells" / key / "train", trained.root)
    found.append(Scene("final", trained, _files(trained, f"cells/{key}/train")))

    ready = trained.copy(scratch / "recorded")
    _only(ready, key, "train")
    found.append(Scene("final of a recorded model", ready, _files(ready, f"cells/{key}/train/final")))

    measured = ready.copy(scratch / "measured")
    from sparseforge_core.evaluate.suites import suite_key
    from tests.soak.grid import SUITES

    for suite in SUITES:
        run.evaluate_cell(cell, suite, measured.root / "cells" / key / suite_key(suite), measured.root)
    names = [f for s in SUITES for f in _files(measured, f"cells/{key}/{suite_key(s)}")]
    found.append(Scene("measurements and items", measured, names))
    return found


def _sparseforge(world: World) -> str:
    store = ResultStore(world.home.store_url)
    try:
        return next(s.cell_key for s in store.work(GRID) if s.method == "sparseforge")
    finally:
        store.close()


def _only(world: World, key: str, stage: str, **options: object) -> None:
    """Execute one stage of one cell."""
    from dataclasses import replace

    from flows.cycle import execute_stage
    from flows.provenance import provenance

    store = ResultStore(world.home.store_url)
    try:
        execute_stage(store, world.home, key, stage, replace(provenance()), **options)  # type: ignore[arg-type]
    finally:
        store.close()


def _files(world: World, folder: str) -> list[Path]:
    found = sorted(p for p in (world.root / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    return [p.relative_to(world.root) for p in found]


def damage(path: Path, chance: random.Random) -> str:
    """Cut a file short or flip one bit of it, at random; what was done."""
    body = bytearray(path.read_bytes())
    if chance.random() < 0.5 or not body:
        length = chance.randrange(len(body)) if body else 0
        path.write_bytes(body[:length])
        return f"cut to {length} of {len(body)} bytes"
    bit = chance.randrange(len(body) * 8)
    body[bit // 8] ^= 1 << bit % 8
    path.write_bytes(body)
    return f"bit {bit} flipped"


def corrupt(reference: Reference, scratch: Path, chance: random.Random, wanted: int, counts: Counts) -> None:
    """Damage files one after the other, each in a copy of its scene, and finish the grid."""
    stages = scenes(reference, scratch)
    bundle = _bundle(scratch)
    jobs: list[tuple[Scene, Path]] = [(scene, file) for scene in stages for file in scene.files]
    names = [p.relative_to(bundle) for p in sorted(bundle.rglob("*")) if p.is_file() and _of_results(p, bundle)]
    for number in range(wanted):
        if number % 4 == 3:
            _corrupt_bundle(reference, bundle, names[number // 4 % len(names)], scratch, chance, counts)
            continue
        scene, file = jobs[number % len(jobs)]
        world = scene.world.copy(scratch / "damaged")
        what = damage(world.root / file, chance)
        counts.add(counts.corruptions, scene.name)
        _mend(world, f"{scene.name}: {file}: {what}", counts)
        counts.compare(world, reference)
    for scene in stages:
        if scene.name == "checkpoint":
            world = scene.world.copy(scratch / "damaged")
            for file in scene.files:
                damage(world.root / file, chance)
                counts.add(counts.corruptions, "every file of every checkpoint")
            _mend(world, "every checkpoint", counts)
            counts.compare(world, reference)


def _mend(world: World, what: str, counts: Counts) -> None:
    """Drain to the end; where an error says what to delete, do that and go on."""
    for _ in range(8):
        try:
            return world.drain()
        except (CheckpointMismatch, DataError) as error:
            advice = ADVICE.search(str(error)) or re.search(r"delete (that folder)", str(error))
            if advice is None:
                counts.tracebacks += 1
                return counts.say(f"{what}: the error says nothing to do: {error}")
            _delete(Path(advice.group(1)))
        except SparseForgeError as error:
            counts.tracebacks += 1
            return counts.say(f"{what}: {type(error).__name__}: {error}")
        except Exception as error:  # the soak counts what should have been a sentence
            counts.tracebacks += 1
            return counts.say(f"{what}: not a sentence: {type(error).__name__}: {error}")
    counts.tracebacks += 1
    return counts.say(f"{what}: eight times the advice did not help")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- bundles


def _bundle(scratch: Path) -> Path:
    """A bundle of the grid that was run to its end."""
    folder = scratch / "bundle"
    write_bundle(choose([GRID]), folder)
    run_there(folder)
    return folder


def _of_results(path: Path, bundle: Path) -> bool:
    """Whether an ingest reads a file: the description, measurements, items, journals, models."""
    name = path.relative_to(bundle)
    read = {"bundle.json", "measurements.json", "items.jsonl", "journal.jsonl"}
    return name.parts[0] not in ("code", "data") and (path.name in read or path.parent.name == "final")


def _corrupt_bundle(
    reference: Reference, bundle: Path, name: Path, scratch: Path, chance: random.Random, counts: Counts
) -> None:
    """Damage one file of a bundle that came back: nothing of it is recorded; the whole one then is."""
    back = scratch / "back"
    shutil.rmtree(back, ignore_errors=True)
    shutil.copytree(bundle, back)
    world = World(scratch / "ingested")
    shutil.rmtree(world.root, ignore_errors=True)
    whole = (back / name).read_bytes()
    what = damage(back / name, chance)
    counts.add(counts.corruptions, "bundle")
    store = ResultStore(world.home.store_url)
    try:
        _refused(lambda: ingest(store, world.home, back), f"bundle: {name}: {what}", counts)
        if any(state.status == "done" for state in store.work(GRID)):
            counts.lost_results += 1
            counts.say(f"bundle: {name}: {what}: something was recorded")
        (back / name).write_bytes(whole)
        ingest(store, world.home, back)
        again = ingest(store, world.home, back)
        if again.recorded:
            counts.double_commits += 1
            counts.say(f"bundle: recorded again: {again}")
    finally:
        store.close()
    counts.compare(world, reference)


def _refused(attempt: Callable[[], object], what: str, counts: Counts) -> None:
    try:
        attempt()
    except BundleError:
        return
    except Exception as error:  # the soak counts what should have been a sentence
        counts.tracebacks += 1
        counts.say(f"{what}: not refused by a sentence: {type(error).__name__}: {error}")
    else:
        counts.lost_results += 1
        counts.say(f"{what}: accepted")

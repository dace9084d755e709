"""One screen about a grid: what is done, what runs and how far it is, what failed and why, what it costs, where it is.

Asking changes nothing. A running cell's step and loss come from its journal, the file that training writes anyway:
no store has to take a write a second, and an outage of the store hides nothing. What runs on a machine that does not
share this home shows its stage, and when it was last heard of.
"""

from __future__ import annotations

import collections
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.cycle import LEASE
from flows.devices import default_workers
from flows.estimates import HOUR, TRAIN, Pace, clock, devices, makespan, spent
from flows.failures import reproducer
from flows.home import Home, shown_url
from flows.provenance import here, process_alive
from sparseforge_core.errors import StoreError
from sparseforge_core.store.results import Results
from sparseforge_core.store.rows import AttemptRecord, StageState
from sparseforge_core.tracking.tracker import read_journal

TAIL = 64 * 1024
"""Bytes of a journal's end that are read for its last steps."""
RECENT = 20
"""Lines of a journal over which the time of a step is taken."""
LISTED = 12
"""Cells of one kind on the screen; `--json` has all."""
BAR = 24

Status = dict[str, Any]
Gone = Mapping[tuple[str, str], str]
"""Of stages (cell key, name) that are running by the store and are not: why."""


def status_of(home: Home, grid: str | None = None, *, now: datetime.datetime | None = None) -> Status:
    """Everything that the screen shows, and more, as plain JSON; of the grid planned last unless one is named."""
    results = _opened(home, grid)
    try:
        now = now or results.now()
        about = _planned(results, grid)
        states, attempts = results.progress(about["name"])
        live = {(a.cell_key, a.stage): a for a in attempts if a.status == "running"}
        gone = {place: why for place, attempt in live.items() if (why := _left(attempt, now))}
        bodies = results.cell_bodies(sorted({cell for cell, _ in live.keys() - gone.keys()}))
    finally:
        results.close()
    by_cell: dict[str, list[StageState]] = collections.defaultdict(list)
    for state in states:
        by_cell[state.cell_key].append(state)
    statuses = {key: _cell_status(stages, gone) for key, stages in by_cell.items()}
    running = [
        _running(home, state, live[state.cell_key, state.stage], bodies, now)
        for state in states
        if state.status == "running" and (state.cell_key, state.stage) not in gone
    ]
    left = _seconds_left(Pace(states, attempts), states, running, gone)
    return {
        "grid": about["name"],
        "title": about["title"],
        "cells": len(by_cell),
        "counts": dict(collections.Counter(statuses.values())),
        "stages": {"done": sum(state.status == "done" for state in states), "total": len(states)},
        "running": running,
        "failed": [_failed(home, s, gone) for s in states if _went_wrong(s, gone)],
        "diverged": _diverged(states),
        **_costs(states, attempts, left, running, now),
        "store": shown_url(home.store_url),
        "home": str(home.root),
        "mlflow": shown_url(home.mlflow_uri),
        "time": now.isoformat(timespec="seconds"),
    }


def _opened(home: Home, grid: str | None) -> Results:
    """The store. Where there is none, a name of no grid is the better thing to complain of."""
    from flows.grids import grid_named

    try:
        return Results(home.store_url)
    except StoreError:
        if grid is not None:
            grid_named(grid)
        raise


def _planned(results: Results, grid: str | None) -> dict[str, Any]:
    """What the store knows of a grid. Raises RecipeError for a name of no grid, StoreError for one never planned."""
    from flows.grids import grid_named

    if grid is not None and grid not in results.grids():
        grid_named(grid)  # says which name is nearest
        raise StoreError(f"grid {grid} was never planned in this store; start it with `sparseforge run {grid}`")
    return results.grid(grid)


def _left(attempt: AttemptRecord, now: datetime.datetime) -> str:
    """Why nobody works on it any more; empty where somebody does. A process may have the number of one that is gone."""
    if attempt.provenance.host == here() and not process_alive(attempt.provenance.pid):
        return "its process is gone"
    silent = now - attempt.heartbeat
    return f"it was not heard of for {clock(silent.total_seconds())}, longer than its lease" if silent > LEASE else ""


def _cell_status(stages: Sequence[StageState], gone: Gone) -> str:
    statuses = {"lost" if (s.cell_key, s.stage) in gone else s.status for s in stages}
    if statuses == {"done"}:
        return "done"
    return next((s for s in ("running", "failed", "lost", "interrupted") if s in statuses), "pending")


def _running(
    home: Home, state: StageState, attempt: AttemptRecord, bodies: Mapping[str, Any], now: datetime.datetime
) -> Status:
    row: Status = {
        **_names(state),
        "stage": state.stage,
        "seconds": round((now - attempt.started).total_seconds(), 1),
        "heard": round(max(0.0, (now - attempt.heartbeat).total_seconds()), 1),
        "host": attempt.provenance.host,
        "pid": attempt.provenance.pid,
    }
    if state.stage == TRAIN:
        row["steps"] = int(bodies[state.cell_key]["recipe"]["train"]["steps"])
        row |= journal_end(home.cell(state.cell_key) / TRAIN / "journal.jsonl", attempt.started)
    return row


def journal_end(path: Path, since: datetime.datetime) -> Status:
    """Last step, its loss, and the seconds of a step in this attempt, as far as the journal's end says them."""
    size = path.stat().st_size if path.is_file() else 0
    lines = [line for line in read_journal(path, max(0, size - TAIL))[0] if "scalars" in line]
    if not lines:
        return {}
    found: Status = {"step": lines[-1]["step"], "loss": lines[-1]["scalars"].get("loss/total")}
    times = [(line["step"], datetime.datetime.fromisoformat(line["t"])) for line in lines[-RECENT:]]
    times = [(step, time) for step, time in times if time >= since]
    if len(times) > 1 and times[-1][0] > times[0][0]:
        found["step_seconds"] = (times[-1][1] - times[0][1]).total_seconds() / (times[-1][0] - times[0][0])
    return found


def _went_wrong(state: StageState, gone: Gone) -> bool:
    return state.status in ("failed", "lost") or (state.cell_key, state.stage) in gone


def _failed(home: Home, state: StageState, gone: Gone) -> Status:
    lost = gone.get((state.cell_key, state.stage), "")
    error = f"{lost}; the next run of the grid goes on from its checkpoint" if lost else state.error
    return {
        **_names(state),
        "stage": state.stage,
        "status": "lost" if lost else state.status,
        "attempts": state.attempts,
        "error": error,
        "cause": "lost worker" if lost else state.cause,
        "quarantined": not lost and state.quarantined,
        "reproduce": reproducer(home, state),
    }


def _diverged(states: Sequence[StageState]) -> list[Status]:
    """What is kept as diverged; of a cell whose training was, that is said once."""
    ended: dict[str, Status] = {}
    for state in states:
        if state.cause == "diverged" and state.status == "done":
            ended.setdefault(state.cell_key, {**_names(state), "stage": state.stage, "error": state.error})
    return list(ended.values())


def _names(state: StageState) -> Status:
    about = {name: getattr(state, name) for name in ("model", "method", "variant", "seed", "pool")}
    return {"key": state.cell_key, **about}


def _seconds_left(
    pace: Pace, states: Sequence[StageState], running: list[Status], gone: Gone
) -> dict[str, tuple[float, str, str]]:
    """(seconds, pool, how that is known) of every cell that is left; also puts an `eta` on what runs.

    Cells in quarantine, and those that wait for them, are left out: they do not end by waiting.
    """
    live = {(row["key"], row["stage"]): row for row in running}
    failed = {s.cell_key for s in states if s.quarantined}
    found: dict[str, tuple[float, str, str]] = {}
    for state in states:
        if state.status == "done" or state.cell_key in failed or failed & set(state.requires):
            continue
        guess = pace.of(state)
        seconds = guess.seconds
        if row := live.get((state.cell_key, state.stage)):
            seconds = row["eta"] = round(_left_of(row, seconds), 1)
        before, _, how = found.get(state.cell_key, (0.0, "", guess.how))
        found[state.cell_key] = before + seconds, state.pool, how if how == guess.how else "mixed"
    return found


def _left_of(row: Status, whole: float) -> float:
    """Seconds until a running stage ends: by its own pace where it has shown one, else by what such stages take."""
    if "step_seconds" in row:
        return float((row["steps"] - row["step"]) * row["step_seconds"])
    return max(0.0, whole - float(row["seconds"]))


def _costs(
    states: Sequence[StageState],
    attempts: Sequence[AttemptRecord],
    left: Mapping[str, tuple[float, str, str]],
    running: Sequence[Status],
    now: datetime.datetime,
) -> Status:
    """Device hours used and left by pool, and when the grid will be over with the workers that run now."""
    pools = {state.cell_key: state.pool for state in states}
    requires = {state.cell_key: state.requires for state in states}
    used: dict[str, float] = collections.defaultdict(float)
    for attempt in attempts:
        live = attempt.status == "running" and not _left(attempt, now)
        seconds = (now - attempt.started).total_seconds() if live else spent(attempt)
        used[pools[attempt.cell_key]] += seconds * devices(pools[attempt.cell_key]) / HOUR
    rest: dict[str, float] = collections.defaultdict(float)
    for seconds, pool, _ in left.values():
        rest[pool] += seconds * devices(pool) / HOUR
    at_work = collections.Counter(row["pool"] for row in running)
    workers = {pool: at_work[pool] or (default_workers() if pool == "cpu" else 1) for pool in rest}
    spans = [
        makespan({key: s for key, (s, own, _) in left.items() if own == pool}, requires, count)
        for pool, count in workers.items()
    ]
    known = collections.Counter(how for *_, how in left.values())
    return {
        "hours": {
            name: {p: round(h, 4) for p, h in sorted(of.items())} for name, of in (("used", used), ("left", rest))
        },
        "eta": {"seconds": round(max(spans, default=0.0), 1), "workers": workers, "known": dict(known)},
    }


def is_over(status: Status) -> bool:
    """Whether nothing is left that could end well by itself: what waits for a quarantined cell waits for ever."""
    return not status["running"] and not status["eta"]["known"]


def screen(status: Status, *, width: int = 120, height: int = 0) -> list[str]:
    """The lines of the screen, each cut to the width; with a height, cells are left out until they fit it."""
    listed = LISTED if height <= 0 else max(1, (height - 12) // 2)
    counts = status["counts"]
    done, cells = counts.get("done", 0), status["cells"]
    others = ", ".join(f"{counts[name]} {name}" for name in ORDER if name in counts)
    filled = BAR * status["stages"]["done"] // max(status["stages"]["total"], 1)
    lines = [f"{status['grid']}: {done} of {cells} cells done [{'#' * filled}{'.' * (BAR - filled)}] {others}".rstrip()]
    if not is_over(status):
        lines.append(_eta_line(status["eta"], bool(status["running"])))
    elif done < cells:
        lines.append("nothing more can run before what failed is dealt with")
    lines += _hours_lines(status["hours"])
    lines += _block("running", [_running_line(row) for row in status["running"]], listed)
    lines += _block("failed", [_failed_line(row) for row in status["failed"]], listed)
    lines += [f"{REPRODUCE}{row['reproduce']}" for row in status["failed"][:listed] if row["quarantined"]]
    lines += _block("kept as diverged", [_diverged_line(row) for row in status["diverged"]], listed)
    if any(row["quarantined"] for row in status["failed"]):
        again = f"sparseforge run {status['grid']} --retry-failed"
        lines += ["", f"all about one: sparseforge explain CELL; once the cause is gone: {again}"]
    lines += ["", f"store   {status['store']}", f"home    {status['home']}", f"mlflow  {status['mlflow']}"]
    return [line if len(line) <= width or line.startswith(REPRODUCE) else _cut(line, width) for line in lines]


REPRODUCE = "    reproduce with: "
"""Begins a line that is never cut: it is there to be copied."""


def _cut(line: str, width: int) -> str:
    return f"{line[: width - 1]}\N{HORIZONTAL ELLIPSIS}"


ORDER = ("running", "failed", "lost", "interrupted", "pending")


def _eta_line(eta: Status, works: bool) -> str:
    at_work = sorted(eta["workers"].items())
    workers = ", ".join(f"{count} worker{'s' * (count > 1)} on {pool}" for pool, count in at_work)
    words = {"measured": "measured", "scaled": "planned, corrected by what was measured", "planned": "planned only"}
    known = ", ".join(f"{count} {words.get(how, how)}" for how, count in sorted(eta["known"].items()))
    when = (
        f"about {clock(eta['seconds'])} left" if works else f"nothing runs; it would take about {clock(eta['seconds'])}"
    )
    return f"{when} with {workers or 'no worker'} (cells: {known or 'none'})"


def _hours_lines(hours: Status) -> list[str]:
    pools = sorted({*hours["used"], *hours["left"]})
    return [
        f"{pool}: {hours['used'].get(pool, 0.0):,.3g} {_unit(pool)} used, {hours['left'].get(pool, 0.0):,.3g} left"
        for pool in pools
    ]


def _unit(pool: str) -> str:
    return "GPU-hours" if pool.startswith("gpu-") else "worker-hours"


def _block(title: str, lines: list[str], listed: int) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - listed} more (--json has all)"] if len(lines) > listed else []
    return ["", title, *lines[:listed], *more]


def _running_line(row: Status) -> str:
    where = row["stage"] if row["stage"] == TRAIN else row["stage"].rpartition("-")[0]
    if row.get("step") is not None:
        loss = "" if row.get("loss") is None else f" loss {row['loss']:.3f}"
        where += f" {row['step']}/{row['steps']}{loss}"
    heard = f"  last heard of {row['heard']:.0f} s ago on {row['host']}" if row["heard"] > QUIET_SECONDS else ""
    eta = f"  {clock(row['eta'])} left" if "eta" in row else ""
    return f"  {row['key']}  {row['model']} {row['variant']} s{row['seed']}  {where}{eta}{heard}"


QUIET_SECONDS = 60.0
"""Without a heartbeat for so long, the screen says since when."""


def _failed_line(row: Status) -> str:
    kept = ", quarantined" if row["quarantined"] else ""
    about = f"{row['stage']} {row['status']}, {row['cause'] or 'unknown'}{kept}, tries {row['attempts']}"
    return f"  {row['key']}  {row['model']} {row['variant']} s{row['seed']}  {about}: {_flat(row['error'])}"


def _diverged_line(row: Status) -> str:
    return f"  {row['key']}  {row['model']} {row['variant']} s{row['seed']}  {row['stage']}: {_flat(row['error'])}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def summary_line(status: Status) -> str:
    """The grid in one line, for logs."""
    counts = ", ".join(f"{status['counts'][name]} {name}" for name in ("done", *ORDER) if name in status["counts"])
    runs = "".join(
        f"  [{r['model']} {r['variant']} s{r['seed']} {r['step']}/{r['steps']}]"
        for r in status["running"]
        if "step" in r
    )
    return f"{status['grid']}: {status['cells']} cells: {counts}, about {clock(status['eta']['seconds'])} left{runs}"

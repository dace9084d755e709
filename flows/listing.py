"""What `plan` and the lists (methods, presets, families, ...) show: rows first, a screen of text second."""

from __future__ import annotations

from typing import Any

from flows.grids import GRIDS, grid_named
from flows.grids.planned import Plan
from flows.home import Home
from sparseforge_core.errors import SparseForgeError


def plan_rows(plan: Plan, finished: frozenset[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row a cell: what it is, where it would run, what it costs, and whether it is done."""
    rows = []
    for cell in plan.cells:
        stages = plan.stages[cell.key]
        done = sum((cell.key, stage) in finished for stage in stages)
        rows.append(
            {
                "key": cell.key,
                "model": cell.model,
                "pattern": cell.pattern,
                "method": cell.method,
                "variant": cell.variant,
                "seed": cell.seed,
                "tokens": cell.tokens,
                "pool": cell.pool,
                "device_hours": round(cell.cost_hours, 4),
                "requires": list(cell.requires),
                "stages": list(stages),
                "status": "done" if done == len(stages) else f"{done}/{len(stages)} done" if done else "pending",
            }
        )
    return rows


def plan_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows, for people."""
    left = f"{'key':<17}{'model':<18}{'pattern':<10}{'variant':<32}{'seed':>4}{'tokens':>16}"
    return [f"{left}  {'pool':<7}{'hours':>10}  status"] + [
        f"{r['key']:<17}{r['model']:<18}{r['pattern']:<10}{r['variant']:<32}{r['seed']:>4}{r['tokens']:>16,}  "
        f"{r['pool']:<7}{r['device_hours']:>10.3f}  {r['status']}"
        for r in rows
    ]


def listing(what: str) -> list[dict[str, Any]]:
    """Rows of one list, with at least `name` and `about`; of families, the tiny model of each is built."""
    if what == "presets":
        from sparseforge_core.identity import diff
        from sparseforge_core.presets import IMPROVED, PRESETS
        from sparseforge_core.specs import encode

        usual = encode(IMPROVED.method, omit_defaults=False)
        return [
            {
                "name": preset.name,
                "about": preset.about,
                "method": encode(preset.method, omit_defaults=False),
                "differs": diff(usual, encode(preset.method, omit_defaults=False)),
                "objective": encode(preset.objective),
                "lr": encode(preset.lr),
                "slorb": None if preset.slorb is None else encode(preset.slorb, omit_defaults=False),
                "permutation": None if preset.permutation is None else encode(preset.permutation, omit_defaults=False),
            }
            for preset in PRESETS.values()
        ]
    if what == "methods":
        import dataclasses

        from sparseforge_core import specs
        from sparseforge_core.methods import METHODS

        return [
            {
                "name": kind,
                "about": f"{cls.card.stage}; {cls.card.source}",
                "kind": cls.card.stage,
                "source": cls.card.source,
                "fields": {
                    f.name: {"type": str(f.type), "default": specs.encode(f.default, omit_defaults=False)}
                    for f in dataclasses.fields(cls)  # type: ignore[arg-type]
                },
            }
            for kind, cls in METHODS.items()
        ]
    if what == "families":
        from sparseforge_core.models.families.survey import survey

        return [
            {
                "name": row.model_type,
                "about": row.about,
                "model_type": row.model_type,
                "family": row.family,
                "sites": sum(row.sites.values()),
                "sites_by_rule": row.sites,
                "coverage": round(row.share, 4),
                "excluded": row.excluded,
            }
            for row in survey()
        ]
    if what == "suites":
        from sparseforge_core import specs
        from sparseforge_core.evaluate.suites import SUITES, suite_key

        return [
            {"name": name, "about": suite_key(suite), "suite": specs.encode(suite, omit_defaults=False)}
            for name, suite in SUITES.items()
        ]
    grids = {name: grid_named(name) for name in GRIDS}
    return [{"name": name, "about": f"{grid.title} ({len(grid.entries)} recipes)"} for name, grid in grids.items()]


def stages_done(home: Home) -> frozenset[tuple[str, str]]:
    """(cell, stage) of everything that the store has finished; nothing where there is no store yet."""
    from sparseforge_core.store.results import Results

    try:
        results = Results(home.store_url)
    except SparseForgeError:  # planning needs no store: then nothing is done yet
        return frozenset()
    try:
        return frozenset(place for place, status in results.stage_statuses().items() if status == "done")
    finally:
        results.close()


__all__ = ["listing", "plan_lines", "plan_rows", "stages_done"]

"""The rooms and their doors: docs/architecture.md, kept true by reading every import.

Each room lists the rooms that it may import; each heavy dependency lists the files that may import it. An import
that only types need (under `if TYPE_CHECKING`) is free at run time and so passes a door, but never a room's wall.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sparseforge_core", "flows", "analysis")
CORE = "sparseforge_core."


def core(names: str) -> set[str]:
    """Rooms of sparseforge_core by their short names."""
    return {CORE + name for name in names.split()}


LEAVES = core("errors specs")
"""Importable by everyone."""

SPECS = core(
    "presets recipe identity methods objective schedules sparsity observe.curvature models.sources data.corpora "
    "evaluate.suites"
)
"""What a grid is written with."""

BELOW_TRAIN = core(
    "checkpoint data distributed files identity methods models objective observe opening recipe schedules sparsity"
)
"""All that turns a recipe into a model, and a model into losses and masks."""

MAY_IMPORT: dict[str, set[str]] = {
    "sparseforge_core": set(),
    CORE + "errors": set(),
    CORE + "specs": set(),
    CORE + "files": set(),
    CORE + "schedules": set(),
    CORE + "sparsity": set(),
    CORE + "data": core("files"),
    CORE + "models": core("sparsity data files"),
    CORE + "memory": set(),
    CORE + "distributed": set(),
    CORE + "recorded": set(),
    CORE + "tf32": set(),
    CORE + "turns": core("files"),
    CORE + "ranks": core("distributed"),
    CORE + "rank_checkpoint": core("checkpoint distributed files methods.base shard_files"),
    CORE + "shard_files": core("checkpoint distributed files"),
    CORE + "observe": core("distributed sparsity models.sites models.layouts tf32"),
    CORE + "methods": core("sparsity schedules models.sites observe data.calibration distributed recorded"),
    CORE + "objective": core("models.sources models.heads models.regions models.rows"),
    CORE + "recipe": core("methods sparsity objective schedules models.sources data.corpora"),
    CORE + "presets": core("recipe methods sparsity objective observe schedules models.sources data.corpora"),
    CORE + "identity": core("recipe"),
    CORE + "measured": core("files"),
    CORE + "bundles": core("data files recipe identity evaluate.suites evaluate.benchmarks"),
    CORE + "bundle_run": core("bundles checkpoint evaluate.suites files identity measured opening recipe"),
    CORE + "bundle_processes": set(),
    CORE + "bundle_status": core("bundles bundle_run evaluate.suites files identity measured opening tracking.tracker"),
    CORE + "packing": core("bundles bundle_run checkpoint files identity measured"),
    CORE + "checkpoint": core("recipe identity models sparsity files methods.base distributed"),
    CORE + "opening": BELOW_TRAIN,
    CORE + "train": BELOW_TRAIN | core("tracking.tracker ranks recorded"),
    CORE + "evaluate": core("data files models recipe identity sparsity opening checkpoint"),
    CORE + "tracking": core("files"),
    CORE + "store": set(),
    CORE + "runtime": core("sparsity models.folders files checkpoint"),
    CORE + "export": core("runtime sparsity models files checkpoint identity opening recipe"),
    CORE + "execution": BELOW_TRAIN | core("train memory ranks turns"),
    CORE + "solutions": core("checkpoint data.cache files methods.base sparsity"),
    CORE + "permuting": core("data.cache files models observe sparsity"),
    CORE + "preparing": BELOW_TRAIN | core("execution permuting solutions train tracking.tracker ranks"),
    CORE + "stage_rows": BELOW_TRAIN | core("measured train"),
    CORE + "run": BELOW_TRAIN
    | core("execution preparing stage_rows train evaluate measured bundles tracking.tracker ranks rank_checkpoint")
    | core("bundle_processes bundle_run bundle_status packing tf32 turns"),
    "flows.grids": SPECS | core("store.rows") | {"flows.placements"},
    "flows.placements": SPECS | {"flows.devices"},
    "flows": SPECS | core("store tracking models.families files") | {"flows"},
    "flows.memory": core("memory"),
    "flows.cycle": SPECS | core("store run files measured tracking.tracker") | {"flows"},
    "flows.stages": SPECS | core("store run execution files measured") | {"flows"},
    "flows.remaking": SPECS | core("store run execution files") | {"flows"},
    "flows.worker": core("store execution") | {"flows"},
    "flows.bundle": SPECS | core("store files bundles") | {"flows"},
    "flows.bundle_data": SPECS | core("files bundles evaluate.benchmarks"),
    "flows.ingesting": SPECS | core("store files measured bundles checkpoint") | {"flows"},
    "flows.unpacking": core("bundles"),
    "flows.launch": SPECS | core("run files") | {"flows"},
    "flows.serving": core("runtime") | {"flows"},
    "flows.outlook": core("runtime") | {"flows"},
    "flows.exporting": SPECS | core("export runtime models.folders files") | {"flows"},
    "flows.cli": core("store files memory") | {"flows", "analysis"},
    "flows.tabulating": core("store") | {"flows", "analysis"},
    "analysis": core("store.results store.rows store.shown store.outcomes store.curves"),
}
"""Room -> rooms it may import, besides itself and the leaves. The longest name that fits a module is its room."""

FUSED = (
    *(f"sparsity/{file}" for file in ("fused", "fused_kernels", "fused_sweep_kernels")),
    *(f"sparsity/{file}" for file in ("group_kernels", "statistics_kernels")),
    "objective/fused_kernels",
    "train/eight_bit_kernels",
)
"""Files of GPU kernels, which are imported where `fused.refusal` has found that they apply."""

DOORS: dict[str, tuple[str, ...]] = {
    "prefect": ("flows/sparseforge.py", "flows/artifacts.py"),
    "mlflow": ("sparseforge_core/tracking/mlflow_tracker.py",),
    "sqlalchemy": ("sparseforge_core/store/",),
    "alembic": ("sparseforge_core/store/",),
    "psycopg": ("sparseforge_core/store/",),
    "scipy": ("analysis/",),
    "matplotlib": ("analysis/", "sparseforge_core/tracking/"),
    "lm_eval": tuple(f"sparseforge_core/evaluate/{file}.py" for file in ("harness", "packed_lm", "stock_tasks")),
    "transformers": ("sparseforge_core/models/", "flows/serving.py"),  # the server around our model is theirs
    "fastapi": ("flows/serving.py",),
    "uvicorn": ("flows/serving.py",),
    "triton": ("sparseforge_core/runtime/", *(f"sparseforge_core/{file}.py" for file in FUSED)),
    "datasets": ("sparseforge_core/data/corpora.py", "sparseforge_core/evaluate/"),
    "pyarrow": ("sparseforge_core/data/",),
    "tokenizers": ("sparseforge_core/data/vocabulary.py",),
    "torch.distributed": (
        *(f"sparseforge_core/{file}.py" for file in ("distributed", "ranks", "train/averaging", "train/parallel")),
        "sparseforge_core/shard_files.py",  # torch.distributed.checkpoint
    ),
    "torch": (
        *(
            f"sparseforge_core/{room}/"
            for room in (
                *("sparsity", "models", "data", "observe", "methods", "objective", "train", "evaluate"),
                *("runtime", "export"),
            )
        ),
        *(f"sparseforge_core/{file}.py" for file in ("checkpoint", "opening", "distributed", "recorded", "tf32")),
        *(
            f"sparseforge_core/{file}.py"
            for file in ("run", "execution", "permuting", "preparing", "solutions", "stage_rows")
        ),
        *(f"sparseforge_core/{file}.py" for file in ("ranks", "rank_checkpoint", "shard_files", "bundle_run", "turns")),
        "flows/outlook.py",  # what a GPU there is copies in a second
        "flows/doctor.py",  # which build is installed and what device it sees
    ),
}
"""Dependency -> files or folders that may import it."""

EXCUSED: dict[tuple[str, str], str] = {
    ("sparseforge_core/stage_rows.py", "transformers"): "its version is part of every measurement's context",
}
"""(file, dependency) -> why that one import outside its door is right."""

BROAD_EXCEPT: dict[str, str] = {
    "flows/worker.py": "it reports whatever a cell raised to its parent and lives on for the next cell",
}
"""Files that may swallow any exception, and why. A broad handler that ends in `raise` needs no excuse."""

COMMAND_LINES = {
    "analysis/make_tables.py",
    "analysis/measurements.py",
    "analysis/study.py",
    "flows/cli.py",
    "flows/doctor.py",
    "flows/listing.py",
    "flows/running.py",
    "flows/tabulating.py",
    "flows/grids/golden.py",
    "sparseforge_core/run.py",
}
"""Files whose standard output is their product; everything else logs."""


@dataclass(frozen=True)
class Import:
    """One imported name, as `package.module` or `package.module.name`."""

    file: str
    line: int
    name: str
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> list[Import]:
    for_types = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute in this project"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(relative(path), node.lineno, name, id(node) in for_types) for name in names]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(module: str) -> str:
    fitting = [room for room in MAY_IMPORT if within(module, room) and (room != "sparseforge_core" or module == room)]
    assert fitting, f"{module} is in no room: add it to MAY_IMPORT here and to docs/architecture.md"
    return max(fitting, key=len)


def test_the_walk_sees_the_project() -> None:
    everything = [i for path in sources() for i in imports(path)]
    assert len(sources()) > 50
    assert any(i.name == "sparseforge_core.sparsity.patterns.Pattern" for i in everything)
    assert any(i.for_types for i in everything)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_what_lies_below_them(package: str) -> None:
    wrong = []
    for path in sources():
        module = module_of(path)
        if not within(module, package):
            continue
        room = room_of(module)
        allowed = MAY_IMPORT[room] | LEAVES | ({room} - {"sparseforge_core"})
        for found in imports(path):
            ours = found.name.split(".")[0] in PACKAGES
            version = found.name == "sparseforge_core.__version__"
            if ours and not version and not any(within(found.name, other) for other in allowed):
                wrong.append(f"{found}; room {room} may import {', '.join(sorted(allowed))}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dependency", DOORS)
def test_each_dependency_has_one_door(dependency: str) -> None:
    wrong = [
        f"{found}; the door of {dependency} is {', '.join(DOORS[dependency])}"
        for path in sources()
        for found in imports(path)
        if within(found.name, dependency)
        and not found.for_types
        and not found.file.startswith(DOORS[dependency])
        and (found.file, dependency) not in EXCUSED
    ]
    assert not wrong, "\n".join(wrong)


def test_sparsity_is_pure_mathematics() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "sparseforge_core"}
    wrong = [
        str(found)
        for path in sources()
        if within(module_of(path), CORE + "sparsity")
        for found in imports(path)
        if found.name.split(".")[0] not in allowed
        and not (found.name.split(".")[0] == "triton" and found.file.startswith(DOORS["triton"]))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("file", "dependency"), EXCUSED)
def test_every_excuse_is_still_needed(file: str, dependency: str) -> None:
    assert any(within(found.name, dependency) for found in imports(ROOT / file)), (
        f"{file} no longer imports {dependency}"
    )


def test_only_command_lines_print() -> None:
    wrong = [
        f"{relative(path)}:{node.lineno} prints; use logging.getLogger(__name__)"
        for path in sources()
        if relative(path) not in COMMAND_LINES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(c is None or ast.unparse(c) in ("Exception", "BaseException") for c in caught)


def raises_again(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def test_no_exception_is_swallowed_unseen() -> None:
    wrong, excused = [], set()
    for path in sources():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            place = f"{relative(path)}:{node.lineno}"
            if all(isinstance(statement, ast.Pass) for statement in node.body):
                wrong.append(f"{place} passes over an error; use contextlib.suppress on one statement, or handle it")
            if is_broad(node) and not raises_again(node):
                if relative(path) in BROAD_EXCEPT:
                    excused.add(relative(path))
                else:
                    wrong.append(f"{place} catches everything; name the errors, or end in `raise`")
    assert not wrong, "\n".join(wrong)
    assert excused == set(BROAD_EXCEPT), "an excuse is no longer needed"


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules after running a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        pytest.param("import sparseforge_core", {"torch", "numpy", "sqlalchemy"}, id="core-is-empty"),
        pytest.param(
            "import analysis.make_tables, sparseforge_core.store.results",
            {"torch", "transformers", "prefect", "mlflow", "lm_eval", "datasets"},
            id="tables-need-no-torch",
        ),
        pytest.param(
            "import flows.cli",
            {"torch", "transformers", "prefect", "mlflow", "sqlalchemy", "pandas"},
            id="help-is-instant",
        ),
        pytest.param(
            "import flows.local, flows.cycle",
            {"torch", "transformers", "prefect", "mlflow"},
            id="nothing-to-do-is-instant",
        ),
        pytest.param(
            "import sparseforge_core.run",
            {"prefect", "mlflow", "sqlalchemy", "pandas", "matplotlib"},
            id="training-is-not-orchestrated",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_an_import_costs(statement: str, never: set[str]) -> None:
    assert not modules_after(statement) & never


TRAINING = core(
    "train methods objective observe sparsity checkpoint recipe identity models data schedules execution permuting "
    "preparing solutions"
)
"""Rooms that decide what a model becomes."""


def imported_rooms(start: str) -> set[str]:
    """Every module of ours that importing the modules of room `start` brings in, at run time."""
    modules = {module_of(path): path for path in sources()}
    left, seen = {name for name in modules if within(name, start)}, set[str]()
    while left:
        module = left.pop()
        seen.add(module)
        for found in imports(modules[module]):
            if not found.for_types:
                left |= {name for name in modules if within(found.name, name) and name != "sparseforge_core"} - seen
    return seen


@pytest.mark.parametrize("room", sorted(TRAINING))
def test_nothing_that_trains_can_reach_an_evaluation(room: str) -> None:
    """No selection on test: neither methods nor the loop can import a suite, a benchmark or the code that measures."""
    reached = imported_rooms(room)
    assert any(within(module, room) for module in reached)
    assert not [module for module in reached if within(module, CORE + "evaluate")]


def test_training_a_cell_uses_nothing_of_evaluation() -> None:
    """`run.py` serves both stages; what `train_cell` calls in it names nothing that comes from `evaluate`."""
    path = ROOT / "sparseforge_core/run.py"
    ours = {i.name.rpartition(".")[2] for i in imports(path) if within(i.name, CORE + "evaluate")}
    assert "evaluate_model" in ours
    bodies = {n.name: n for n in tree(path).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    left, reached = {"train_cell", "finished_training"}, set[str]()
    while left:
        name = left.pop()
        reached.add(name)
        inside = bodies[name].body
        used = {n.id for statement in inside for n in ast.walk(statement) if isinstance(n, ast.Name)}
        assert not used & ours, f"{name} in run.py uses {', '.join(sorted(used & ours))}, which is evaluation"
        left |= (used & bodies.keys()) - reached
    assert "_train_to_the_end" in reached
    assert "evaluate_cell" not in reached


def test_a_checkpoint_holds_no_metric() -> None:
    """Nothing in the code of checkpoints names a score: they are kept, and found again, by their step."""
    path = ROOT / "sparseforge_core/checkpoint.py"
    names = {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree(path)) if isinstance(n, ast.arg)}
    names |= {n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    short = {name for name in names if len(name.split()) == 1}  # sentences are messages and docstrings
    assert {"step", "optimizer", "track", "cell"} <= short
    assert not [name for name in short if re.search(r"metric|accura|perplex|loss|score|best", name)]

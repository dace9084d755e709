"""The arguments of the `sparseforge` command. Imports nothing heavy: `--help` is instant."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from sparseforge_core import __version__


class Parser(argparse.ArgumentParser):
    """Suggests the nearest name for a mistyped command."""

    def error(self, message: str) -> Any:
        if "invalid choice" in message and "'" in message:
            tried = message.split("'")[1]
            near = difflib.get_close_matches(tried, COMMANDS, n=1)
            message += f". Did you mean {near[0]!r}?" if near else ""
        super().error(message)


COMMANDS = (
    "demo", "plan", "run", "status", "explain", "tables", "report", "verify", "audit", "doctor", "methods", "presets",
    "families", "suites", "grids", "bundle", "ingest", "export", "verify-export", "generate", "serve", "bench",
    "completion",
)  # fmt: skip


ANSWER, NOTHING = "the same as JSON", "say nothing: the exit code answers"
MANNERS = {
    **dict.fromkeys(COMMANDS, (ANSWER, NOTHING)),
    **dict.fromkeys(("demo", "run"), ("end with one line of JSON, the only one on stdout", "no progress")),
    **dict.fromkeys(("bundle", "ingest"), ("one line of JSON with the counts", "say nothing")),
    "plan": (ANSWER, "the totals alone"),
    "status": ("the same as JSON; with --watch one object a line", NOTHING),
    "tables": ("as JSON: the files, what is missing, what is empty", "say only what is missing"),
    "report": ("one line of JSON: the grid and the file", "say nothing"),
    "export": ("one line of JSON: the folder and what is in it", "say nothing"),
    "generate": ("the continuation, its tokens and how it was made as JSON", "the continuation alone"),
    "serve": ("one line of JSON once it listens: address and model", "errors alone"),
    "bench": (
        "end with the rows as JSON on stdout, and say all else on stderr",
        "no lines, for the exit code or --json",
    ),
}
"""What `--json` and `--quiet` do, which every command takes."""

EXIT_CODES = {
    "": "0 done, 2 bad input",
    "demo": "0 done, 1 some cells failed, 2 bad input, 130 stopped (run again to go on)",
    "run": "0 done, 1 some cells failed, 2 bad input, 130 stopped (run again to go on)",
    "explain": "0 shown, 2 bad input, or a key that is unknown or stands for several cells",
    "status": "0 nothing failed, 1 something failed, 2 bad input",
    "tables": "0 written, 2 bad input, or something partial with --strict",
    "verify": "0 everything matches, 1 something does not, 2 bad input",
    "plan": "0 shown (a disk that is too small is a warning), 2 bad input",
    "ingest": "0 recorded, also when there was nothing to record, 2 bad input, or files that do not verify",
    "audit": "0 everything adds up, 1 something does not, 2 bad input",
    "doctor": "0 all well, 1 something is missing",
    "bench": "0 done, 1 a part failed, 2 bad input",
}
"""What each command's exit code means; the first line is for all others."""


def parser() -> argparse.ArgumentParser:
    """The whole command line; `options.command` says which subcommand was given."""
    top = Parser(
        prog="sparseforge",
        description="Make language models 2:4 sparse, measure every rival under one harness, and get the tables.",
        epilog="Exit codes: 0 done, 1 something failed or is partial, 2 bad input, 130 stopped (run again to go on).",
    )
    top.add_argument("--version", action="version", version=f"sparseforge {__version__}")
    top.set_defaults(home=None, db=None)
    _add_places(top)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_running(commands)
    _add_carrying(commands)
    _add_reading(commands)
    _add_exporting(commands)
    for name, command in commands.choices.items():
        _add_places(command)
        _add_manners(command, *MANNERS[name])
        codes = EXIT_CODES.get(name, EXIT_CODES[""])
        command.epilog = f"{command.epilog}. Exit codes: {codes}." if command.epilog else f"Exit codes: {codes}."
    return top


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Before or after the command, as people type it; only what is given is set."""
    home = "folder for everything that runs make (default $SPARSEFORGE_HOME or runs)"
    parser.add_argument("--home", type=Path, default=argparse.SUPPRESS, help=home)
    db = "results store (default $SPARSEFORGE_DB or sqlite:///HOME/store.db)"
    parser.add_argument("--db", metavar="URL", default=argparse.SUPPRESS, help=db)


def _add_manners(parser: argparse.ArgumentParser, as_json: str, quiet: str) -> None:
    parser.add_argument("--json", action="store_true", help=as_json)
    parser.add_argument("--quiet", action="store_true", help=quiet)


def _add_running(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole path on tiny models: train, evaluate, tables, figure",
        description="Run the demo grid, then write its tables and figure. Running it again goes on where it stopped.",
        epilog="example: sparseforge demo --workers 2",
    )
    run = commands.add_parser(
        "run",
        help="run what is not done of a grid on this machine",
        description="Plan a grid and run every stage that is not done. A finished cell is never run twice.",
        epilog="example: sparseforge run smollm2-smoke",
    )
    run.add_argument("grid", help="a grid's name; `sparseforge grids` lists them")
    run.add_argument("--prefect", action="store_true", help="record each stage as a Prefect task run")
    run.add_argument("--pool", help="only the cells placed there, whatever devices this machine has: cpu, gpu-1, gpu-8")
    demo.add_argument("--no-prefect", dest="prefect", action="store_false", help="leave Prefect out of it")
    for command in (demo, run):
        command.add_argument("--workers", type=int, help="worker processes (default: one a GPU, else one a core)")
        command.add_argument(
            "--notify",
            metavar="COMMAND",
            help="called when a cell fails and when the grid ends, with a JSON object on its standard input "
            "(default $SPARSEFORGE_NOTIFY)",
        )
        command.add_argument(
            "--retry-failed",
            action="store_true",
            help="take cells out of quarantine first: those that used up their tries",
        )
    demo.set_defaults(grid="demo", pool=None)
    plan = commands.add_parser(
        "plan",
        help="every cell of a grid, and what is left of it costs: device hours, disk, time",
        description="Show what a grid would run and what it costs, without running anything. Warns of a disk that is "
        "too small. Times are those measured in the store, else the plan's.",
        epilog="example: sparseforge plan full --workers 8",
    )
    plan.add_argument("grid", nargs="?")
    plan.add_argument("--workers", type=int, help="of each pool, for time and disk (default: what `run` would start)")
    plan.add_argument("--memory", metavar="MODEL", help="instead: bytes per GPU and time of training this model")
    plan.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="with --memory: numbers of GPUs")
    plan.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="with --memory: of each GPU")
    plan.add_argument("--micro-batch", type=int, default=1, help="with --memory: sequences per forward and GPU")
    plan.add_argument("--length", type=int, default=4096, help="with --memory: tokens per sequence")
    plan.add_argument(
        "--eight-bit-moments", action="store_true", help="with --memory: TrainPlan.moments='8-bit', so never sharded"
    )
    plan.add_argument(
        "--from-one-shot", action="store_true", help="with --memory: starts from a one-shot solution, so never sharded"
    )
    plan.add_argument("--no-teacher", action="store_true", help="with --memory: without distillation")
    plan.add_argument(
        "--out", type=Path, help="also write each cell and suite as a file for `python -m sparseforge_core.run`"
    )


def _add_carrying(commands: Any) -> None:
    bundle = commands.add_parser(
        "bundle",
        help="write cells into a folder that runs without a store or a network",
        description="Write a folder with cells, code and data. There: PYTHONPATH=OUT/code python -m "
        "sparseforge_core.run bundle OUT. Then copy OUT/home back and run `sparseforge ingest OUT`.",
        epilog="example: sparseforge bundle tiny-smoke --out carried",
    )
    bundle.add_argument("what", nargs="+", metavar="CELL|GRID", help="the beginning of a cell's key, or a grid")
    bundle.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    bundle.add_argument("--grid", help="where the keys are looked up (default: the first grid that has each)")
    bundle.add_argument("--pool", help="of a grid only the cells placed there, and what they need")
    bundle.add_argument("--variant", nargs="+", metavar="NAME", help="of a grid only these, as `plan` has them")
    bundle.add_argument("--seed", type=int, nargs="+", help="of a grid only these seeds")
    bundle.add_argument(
        "--millions", type=int, nargs="+", metavar="N", help="of a grid only these budgets, whole millions of tokens"
    )
    bundle.add_argument("--missing", action="store_true", help="of a grid only cells that have something left to do")
    bundle.add_argument(
        "--there", action="store_true", help="models, texts and tasks that a bundle cannot carry are on that machine"
    )
    bundle.add_argument("--slurm", action="store_true", help="also write a job array and the script that submits it")
    ingest = commands.add_parser(
        "ingest",
        help="record what a bundle made elsewhere, or the results of a decode benchmark",
        description="Check every file of a bundle that came back, record each finished stage once, keep its model. Of "
        "a .json file of benchmarks/decode.py, record the speeds and weights that Table 7 shows.",
        epilog="example: sparseforge ingest carried",
    )
    ingest.add_argument(
        "folder",
        type=Path,
        metavar="DIR|ARCHIVE|FILE.json",
        help="the bundle's folder, with its home/ in it; what `sparseforge_core.run pack` made of it; or the results",
    )


def _add_reading(commands: Any) -> None:
    status = commands.add_parser(
        "status",
        help="one screen about a grid: done, running with step and loss, failed with cause, hours used and left",
        description="What is done, what runs and how far it is, what failed and why, device hours used and left, and "
        "where everything is. Asking changes nothing.",
        epilog="example: sparseforge status demo --watch",
    )
    status.add_argument("grid", nargs="?", help="default: the grid planned last")
    status.add_argument("--watch", action="store_true", help="show it again and again, until it is over or Ctrl-C")
    status.add_argument(
        "--every", type=float, metavar="SECONDS", help="with --watch (default 2; 10 without a terminal)"
    )
    explain = commands.add_parser(
        "explain",
        help="one cell: recipe, who wants it, why it ran or has not, attempts, log, files, how to reproduce",
        description="Everything about one cell of any grid in the store.",
        epilog="example: sparseforge explain 0123456789ab-s0",
    )
    explain.add_argument("cell", metavar="CELL", help="a cell's key, or the beginning of one")
    tables = commands.add_parser(
        "tables",
        help="write Tables 1-7 and the figures from the store; with --only also show them here",
        epilog="example: sparseforge tables --grid demo --only table-2",
    )
    tables.add_argument("--grid", help="default: the grid planned last")
    tables.add_argument("--out", type=Path, help="folder (default HOME/GRID)")
    tables.add_argument("--only", action="append", help="an exhibit, such as table-2; may be repeated")
    tables.add_argument("--strict", action="store_true", help="exit 2 when anything is partial")
    _add_trusting(commands)
    _add_doctor(commands)
    bench = commands.add_parser(
        "bench",
        help="measure training or decoding on this machine",
        description="Run one of the benchmarks of the repository; what follows its name is handed to it.",
        epilog="example: sparseforge bench train --parts mask_update 135m --out DIR; `bench train --help` says more",
    )
    bench.add_argument("benchmark", choices=("train", "decode"), help="which: benchmarks/train.py or decode.py")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    for name, what in (
        ("methods", "pruning methods"),
        ("presets", "named readings of the paper's method"),
        ("families", "model families"),
        ("suites", "evaluation suites"),
        ("grids", "grids"),
    ):
        commands.add_parser(name, help=f"list the {what}")


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check this machine and installation, say what to do; with --model, what 2:4 will bring here",
        epilog="example: sparseforge doctor --model llama-2-7b --batch 4",
    )
    doctor.add_argument("--model", help="a known model's name, or the folder of an export or of a Hugging Face model")
    doctor.add_argument("--batch", type=int, default=1, help="rows decoded at a time (default 1)")
    doctor.add_argument("--context", type=int, help="tokens before those decoded (default 192, or half of the model's)")
    doctor.add_argument("--prompt", type=int, help="tokens of a prompt (default 2048, or all the model takes)")
    doctor.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="type of the values")


def _add_trusting(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one HTML file with everything: tables, figures, tests, where each number comes from",
        description="Write a self-contained report of a grid: it opens offline and asks no server for anything.",
        epilog="example: sparseforge report --grid demo --out report.html",
    )
    report.add_argument("--grid", help="default: the grid planned last")
    report.add_argument("--out", type=Path, help="file (default HOME/GRID/report.html)")
    verify = commands.add_parser(
        "verify",
        help="prove that the numbers match their single items, files and the results log",
        description="Check the whole store, or the way from one cell of a table back to its items.",
        epilog="example: sparseforge verify table-2 SparseForge Avg",
    )
    verify.add_argument(
        "place", nargs="*", metavar="TABLE ROW COLUMN", help="one cell of a table (default: everything)"
    )
    verify.add_argument("--grid", help="default: the grid planned last")
    audit = commands.add_parser(
        "audit",
        help="what in a table does not add up: means, differences, ranks, numbers stated twice",
        description="Recompute a grid's tables from their printed numbers, the paper's with `published`, or anybody's.",
        epilog="example: sparseforge audit published --json",
    )
    audit.add_argument(
        "what",
        metavar="published|GRID|FILE.csv",
        help="the paper's numbers, a grid of this store, or a table typed off a page (head: table,row,column,text)",
    )
    completion = commands.add_parser(
        "completion",
        help="the script that lets a shell complete our commands and options",
        description="Print the script for a shell; load it in the shell's start-up file.",
        epilog='example: eval "$(sparseforge completion bash)"',
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _add_exporting(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a finished model for others: packed, or a Hugging Face folder",
        description="Write a finished cell, an earlier export or a pruned Hugging Face folder, every group checked.",
        epilog="example: sparseforge export 0123456789ab-s0 --format packed --dtype bfloat16 --out model",
    )
    export.add_argument("source", metavar="CELL|DIR", help="a cell's key, or a folder")
    export.add_argument("--format", required=True, help="packed, or hf (dense with exact zeros, for transformers)")
    export.add_argument("--out", type=Path, help="folder (default HOME/exports/NAME-FORMAT)")
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as trained)")
    export.add_argument("--pattern", help="of a folder that does not say it: 2:4 or another N:M, block-16")
    verify = commands.add_parser(
        "verify-export",
        help="check every file, tensor and group of an export",
        epilog="example: sparseforge verify-export model",
    )
    verify.add_argument("folder", type=Path, metavar="DIR")
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a packed export",
        description="Greedy by default. The continuation goes to standard output, the load report to standard error.",
        epilog="example: sparseforge generate model --prompt 'Once upon a time' --tokens 40",
    )
    generate.add_argument("folder", type=Path, metavar="DIR", help="a packed export")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--tokens", type=int, default=64, help="at most so many (default 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")
    serve = commands.add_parser(
        "serve",
        help="answer OpenAI-compatible requests with a packed export",
        description="transformers' server around our model: /v1/chat/completions, /v1/completions (both may stream), "
        "/v1/models, /health. It listens to this machine alone unless --host says otherwise, and asks for no key.",
        epilog="example: sparseforge serve model --port 8000",
    )
    serve.add_argument("folder", type=Path, metavar="DIR", help="a packed export")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    serve.add_argument("--name", help="of the model, as clients ask for it (default: the folder's)")
    for command in (generate, serve):
        command.add_argument("--dense", action="store_true", help="unpack once: more memory, faster on a CPU")
        command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
        command.add_argument(
            "--cache",
            default="auto",
            help="static (one CUDA graph a token, LLaMA-like models), ordinary (transformers' own), or auto",
        )
        command.add_argument(
            "--mode",
            default="decode",
            help="decode (packed weights alone, the default), or throughput (also forms of them that were measured to "
            "make long prompts and large batches faster; a GPU only)",
        )

"""The 2:4 kernels against the strongest dense products, at LLaMA-2-7B's shapes, all from one run on one GPU.

python benchmarks/sparse_products.py [--compiled] [--rows 1 16] [--dtype bfloat16 float16] [--shape NAME]

Every time is the median of a CUDA graph that rotates through weights which do not fit the L2 cache together. Dense is
the fastest of cuBLAS (as a matrix and as a vector product), our own dense Triton kernel in several sizes, and, with
--compiled, what torch.compile makes of the product as multiply and sum. For 2 to 64 rows it is the faster of cuBLAS and
a dense Triton kernel on the tensor cores, beyond that cuBLAS. Sparse is
`sparse_linear` as a model calls it, after `tune`. Dense and sparse are measured in turn, twice; a ratio is the mean of
the two and stands beside their spread. Each product is first held against float64 (`error`). A second --dtype is
measured beside the first: its figures end in its name, and `float16_over_bfloat16` is how many times faster it is.
Bandwidth counts the bytes of values and places, and is held against a copy of
2 GiB on the device, bytes read plus bytes written. Of more than 64 rows `rows_over_dense` is mode throughput, and
`packed_over_dense` mode decode, which holds the packed weight alone. Records go to $OUT/kernels.json if OUT is set.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.dense_gemv import CONFIGS, ROWS_CONFIGS, dense_gemv, dense_rows
from sparseforge_core.runtime.kernels import KernelWeight, sparse_linear
from sparseforge_core.runtime.kernels.choices import FEW as FEW_ROWS
from sparseforge_core.runtime.kernels.choices import choose
from sparseforge_core.runtime.kernels.measure import COLD, copy_bandwidth, seconds
from sparseforge_core.runtime.kernels.rehearsal import random_packed
from sparseforge_core.runtime.kernels.table import Choice
from sparseforge_core.runtime.kernels.tuning import tune
from sparseforge_core.runtime.linear import PackedWeight
from sparseforge_core.runtime.packed import Layout, Packed

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
"""[out, in] of LLaMA-2-7B's matrices as they are multiplied."""

FEW, SOME, BETWEEN, MANY = (2, 4, 8, 16), (24, 32, 48, 64), (96, 128, 256, 512, 1024), (2048, 4096, 8192)
"""Rows: 2-16, 17-64, what lies between, and prefill."""

WRONG = 1e-2
"""Relative error beyond which a product is not timed: bfloat16 rounds once, to 3e-3."""


class Case:
    """One shape, with enough weights that none is found in the cache."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, (self.out, self.inputs), self.dtype = name, SHAPES[name], dtype
        self.sparse_bytes, self.dense_bytes = self.out * self.inputs * 9 // 8, self.out * self.inputs * 2
        self.weights = [self._weight() for _ in range(max(2, -(-COLD // self.sparse_bytes)))]
        self.packed = [
            KernelWeight(weight.values, weight.places, SHAPES[name], weight.backend) for weight in self.weights
        ]
        count = max(2, -(-COLD // self.dense_bytes))
        self.dense = [weight.dense() for weight in self.weights[:count]]

    def _weight(self) -> KernelWeight:
        packed = Packed(*random_packed(self.out, self.inputs, self.dtype, "cuda"))
        whole = PackedWeight(packed, Layout(2, 4, transposed=False), (self.out, self.inputs))
        return KernelWeight.of(whole, mode="throughput")

    def x(self, rows: int) -> Tensor:
        """Random rows."""
        return torch.randn(rows, self.inputs, device="cuda").to(self.dtype)

    def sparse(self, x: Tensor, *, packed: bool = False) -> tuple[Callable[[], float], float]:
        """Seconds of `sparse_linear`, once its product was compared with float64 on some outputs; and its error."""
        some = torch.randint(0, self.out, (64,), device="cuda")
        weights = self.packed if packed else self.weights
        y = sparse_linear(x, weights[0])[:, some]
        wrong = _compare(y, x, self.dense[0][some], f"{self.name} {x.shape[0]} rows")
        return self._timed([functools.partial(sparse_linear, x, weight) for weight in weights], x), wrong

    def choice(self, rows: int, *, packed: bool = False) -> Choice:
        """The way that a product of so many rows takes."""
        weight = (self.packed if packed else self.weights)[0]
        return choose(self.out, self.inputs, rows, self.dtype, 0, weight.forms)

    def cublas(self, x: Tensor) -> Callable[[], float]:
        """Seconds of the dense product."""
        return self._timed([functools.partial(linear, x, weight) for weight in self.dense], x)

    def vectors(self, x: Tensor, *, compiled: bool) -> dict[str, Callable[[], float]]:
        """Every dense way to multiply one row."""
        y = torch.empty(1, self.out, dtype=self.dtype, device="cuda")
        found = {"cuBLAS": self.cublas(x)}
        found["cuBLAS, vector"] = self._timed([functools.partial(torch.mv, w, x[0]) for w in self.dense], x)
        for config in CONFIGS:
            dense_gemv(x, self.dense[0], y.fill_(float("nan")), config)
            _compare(y, x, self.dense[0], f"dense Triton {config}")
            calls = [functools.partial(dense_gemv, x, weight, y, config) for weight in self.dense]
            found[f"Triton {config}"] = self._timed(calls, x)
        if compiled:
            made = torch.compile(_multiply_and_sum, dynamic=False)
            _compare(made(x, self.dense[0]), x, self.dense[0], "torch.compile")
            found["torch.compile"] = self._timed([functools.partial(made, x, weight) for weight in self.dense], x)
        return found

    def several(self, x: Tensor) -> Callable[[], float]:
        """The fastest dense way to multiply a few rows."""
        ways = [self.cublas(x)]
        y = torch.empty(x.shape[0], self.out, dtype=self.dtype, device="cuda")
        for config in ROWS_CONFIGS if x.shape[0] <= 64 else ():
            dense_rows(x, self.dense[0], y.fill_(float("nan")), config)
            _compare(y, x, self.dense[0], f"dense Triton {config}")
            ways.append(self._timed([functools.partial(dense_rows, x, w, y, config) for w in self.dense], x))
        return min(((way(), n, way) for n, way in enumerate(ways)))[2]

    @staticmethod
    def _timed(calls: list[Callable[[], Any]], x: Tensor) -> Callable[[], float]:
        least = 24 if x.shape[0] <= 256 else 6
        return functools.partial(seconds, calls, least=least, replays=11 if x.shape[0] <= 64 else 5)


def _multiply_and_sum(x: Tensor, weight: Tensor) -> Tensor:
    return (weight.float() * x.float()).sum(-1).to(x.dtype)


def _compare(y: Tensor, x: Tensor, dense: Tensor, what: str) -> float:
    """Error relative to float64; ends the run where a product is wrong."""
    exact = x.double() @ dense.double().T
    wrong = float((y.double() - exact).norm() / exact.norm())
    if not wrong < WRONG:
        raise SystemExit(f"{what}: the product is wrong by {wrong:.3g}")
    return wrong


def in_turn(dense: Callable[[], float], sparse: Callable[[], float]) -> tuple[float, float, float]:
    """Dense over sparse, the mean of two tries; the spread of the two; the shorter sparse seconds."""
    tries = [(dense(), sparse()) for _ in range(2)]
    ratios = [d / s for d, s in tries]
    return sum(ratios) / 2, abs(ratios[0] - ratios[1]), min(s for _, s in tries)


def geomean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


BARS: dict[str, float] = {
    **{f"gemv_over_best_dense.{name}": 1.50 for name in SHAPES},
    "gemv_over_best_dense.geomean": 1.65,
    "gemv_bandwidth_share.gate_up": 0.92,
    "gemv_bandwidth_share.down": 0.92,
    "rows_over_best_dense.2_16": 1.35,
    "rows_over_best_dense.17_64": 1.15,
    "prefill_over_dense.mlp": 1.35,
    "worst_over_dense": 0.99,
    "worst_over_dense.packed": 0.99,
}


class Report:
    """What was found, printed as it comes."""

    def __init__(self, commit: str, copied: float) -> None:
        command = " ".join(["python", "benchmarks/sparse_products.py", *sys.argv[1:]])
        hardware = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e12:.3f} TB/s"
        self.about = {"hardware": hardware, "command": command, "commit": commit}
        self.copied, self.records, self.ratios = copied, [], {}
        self.records: list[dict[str, Any]]
        self.ratios: dict[tuple[str, int], float]
        self.packed: dict[tuple[str, int], float] = {}
        self.took: dict[tuple[str, int, str], float] = {}
        self.beside = ""  # after a name, where a second type is measured

    def add(self, measure: str, value: float, unit: str) -> None:
        """One record; those without a bar are there to be read."""
        row = {"measure": measure + self.beside, "value": round(value, 4), "unit": unit, "bar": BARS.get(measure)}
        self.records.append(row | self.about)

    def shape(self, name: str, dtype: torch.dtype, sizes: tuple[int, ...], *, compiled: bool) -> None:
        """All of one shape, after its choices were measured."""
        with torch.no_grad():
            tune([SHAPES[name]], dtype, sizes, copies=True)
            case = Case(name, dtype)
            self.add(f"held.{name}", case.weights[0].resident_bytes / case.dense_bytes, "of a dense weight, throughput")
            if 1 in sizes:
                self.one_row(case, compiled=compiled)
            self.rows(case, tuple(n for n in sizes if n > 1))

    def write(self) -> None:
        """What was found so far, to $OUT/kernels.json."""
        if "OUT" in os.environ:
            path = Path(os.environ["OUT"]) / "kernels.json"
            path.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")

    def one_row(self, case: Case, *, compiled: bool) -> None:
        """The matrix-vector product of one shape."""
        x = case.x(1)
        ways = case.vectors(x, compiled=compiled)
        took = {name: timed() for name, timed in ways.items()}
        best = min(took, key=lambda name: took[name])
        timed, wrong = case.sparse(x)
        ratio, spread, sparse = in_turn(ways[best], timed)
        self._beside(case, 1, sparse, wrong)
        share = case.sparse_bytes / sparse / self.copied
        print(
            f"{case.name}: 2:4 {sparse * 1e6:.2f} us, {ratio:.3f}x (spread {spread:.3f}) over {best} "
            f"{took[best] * 1e6:.2f}, {share:.3f} of copy; dense {case.dense_bytes / took[best] / self.copied:.3f}; "
            + ", ".join(f"{name} {seconds_ * 1e6:.2f}" for name, seconds_ in took.items() if "Triton" not in name)
            + f"; {_label(case.choice(1))}",
            flush=True,
        )
        self._ratio(case, 1, ratio)
        self.add(f"gemv_over_best_dense.{case.name}", ratio, f"times {best}, one row")
        self.add(f"gemv_bandwidth_share.{case.name}", share, "of measured copy bandwidth")

    def _ratio(self, case: Case, rows: int, ratio: float) -> None:
        if not self.beside:
            self.ratios[case.name, rows] = ratio

    def _beside(self, case: Case, rows: int, took: float, wrong: float) -> None:
        """The error; and how this type compares with the first, where that was measured."""
        self.add(f"error.{case.name}.{rows}", wrong, "of the norm, against float64")
        dtype = str(case.dtype).removeprefix("torch.")
        self.took[case.name, rows, dtype] = took
        first = self.took.get((case.name, rows, "bfloat16"))
        if dtype == "float16" and first is not None:
            print(f"{case.name} {rows} rows: float16 {first / took:.3f}x of bfloat16", flush=True)
            self.add(f"float16_over_bfloat16.{case.name}.{rows}", first / took, "times")

    def rows(self, case: Case, sizes: tuple[int, ...]) -> None:
        """Several rows against the best dense way."""
        for n in sizes:
            x = case.x(n)
            dense = case.several(x)
            ratio, wrong, sparse = self._measured(case, x, dense, packed=False)
            self._beside(case, n, sparse, wrong)
            self._ratio(case, n, ratio)
            self.add(f"rows_over_dense.{case.name}.{n}", ratio, "times the best dense")
            if n <= FEW_ROWS:
                continue
            if case.choice(n) != case.choice(n, packed=True):
                ratio, _, _ = self._measured(case, x, dense, packed=True)
            if not self.beside:
                self.packed[case.name, n] = ratio
            self.add(f"packed_over_dense.{case.name}.{n}", ratio, "times the best dense, mode decode")

    @staticmethod
    def _measured(case: Case, x: Tensor, dense: Callable[[], float], *, packed: bool) -> tuple[float, float, float]:
        """Dense over sparse, the error, and the sparse seconds."""
        rows, mode = x.shape[0], "decode" if packed else "throughput"
        timed, wrong = case.sparse(x, packed=packed)
        ratio, spread, sparse = in_turn(dense, timed)
        print(
            f"{case.name} {rows} rows, mode {mode}: 2:4 {sparse * 1e6:.1f} us, {ratio:.3f}x (spread {spread:.3f}) of "
            f"{ratio * sparse * 1e6:.1f}; {_label(case.choice(rows, packed=packed))}",
            flush=True,
        )
        return ratio, wrong, sparse

    def summarize(self) -> None:
        """The records that have bars."""
        groups = (
            ("gemv_over_best_dense.geomean", (1,), tuple(SHAPES)),
            ("rows_over_best_dense.2_16", FEW, tuple(SHAPES)),
            ("rows_over_best_dense.17_64", SOME, tuple(SHAPES)),
            ("prefill_over_dense.mlp", MANY, ("gate_up", "down")),
        )
        packed_groups = (
            ("packed_between_over_dense", BETWEEN, tuple(SHAPES)),
            ("packed_prefill_over_dense", MANY, tuple(SHAPES)),
            ("packed_prefill_over_dense.mlp", MANY, ("gate_up", "down")),
        )
        for ratios, several in ((self.ratios, groups), (self.packed, packed_groups)):
            for measure, sizes, names in several:
                values = [ratios[name, n] for name in names for n in sizes if (name, n) in ratios]
                if len(values) == len(sizes) * len(names):
                    self.add(measure, geomean(values), "times, geometric mean over shapes and rows")
        few = {place: ratio for place, ratio in self.ratios.items() if place[1] <= FEW_ROWS}
        for measure, ratios in (("worst_over_dense", self.ratios), ("worst_over_dense.packed", few | self.packed)):
            if ratios:
                worst = min(ratios, key=lambda place: ratios[place])
                count = f"the least of {len(ratios)}"
                self.add(measure, ratios[worst], f"times, {count}, at {worst[0]} with {worst[1]} rows")
        for record in self.records:
            if record["bar"] is not None:
                held = "held" if record["value"] >= record["bar"] else "MISSED"
                print(f"{record['measure']:32} {record['value']:8.3f}  bar {record['bar']:.2f}  {held}")


def _label(choice: Choice) -> str:
    if choice.plan is None:
        return f"{choice.kind} {choice.algorithm}" if choice.kind == "cusparselt" else choice.kind
    plan = choice.plan
    sizes = f"w{plan.warps} d{plan.depth} t{plan.tiles} s{plan.split} r{plan.resident} h{plan.share}"
    return f"{plan.kernel} {plan.rows} {sizes}"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"))
    parser.add_argument("--compiled", action="store_true", help="let torch.compile compete for one row")
    parser.add_argument("--only", default="all", choices=("all", "one", "few", "many"))
    parser.add_argument("--rows", nargs="+", type=int, help="these alone, instead of --only")
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES))
    parser.add_argument("--commit", default="", help="of this tree; git is asked if it is not given")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: the kernels have nothing to run on")
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    began = time.perf_counter()
    torch.manual_seed(time.time_ns() % 2**31)
    report = Report(commit, copy_bandwidth())
    print(report.about["hardware"], flush=True)
    sizes = (
        tuple(options.rows or ())
        or {
            "all": (1, *FEW, *SOME, *BETWEEN, *MANY),
            "one": (1,),
            "few": (1, *FEW, *SOME),
            "many": (*BETWEEN, *MANY),
        }[options.only]
    )
    failed = False
    for number, name in itertools.product(range(len(options.dtype)), options.shape or SHAPES):
        report.beside = f".{options.dtype[number]}" if number else ""
        try:
            report.shape(name, getattr(torch, options.dtype[number]), sizes, compiled=options.compiled)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            failed = True
        report.write()
        torch.cuda.empty_cache()
        print(f"{name} done after {time.perf_counter() - began:.0f} s", flush=True)
    report.beside = ""
    report.summarize()
    report.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Every candidate plan of the 2:4 kernels on this GPU: whether it is right, and how fast it is.

python benchmarks/kernel_sweep.py [--part check] [--part vector] [--part rows] [--part large] [--seconds S]

For the one who changes a kernel: `benchmarks/sparse_products.py` gives the figures that are published. Results go to
$OUT/sweep-PART.json if OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.dense_gemv import CONFIGS, dense_gemv
from benchmarks.sparse_products import SHAPES
from sparseforge_core.runtime.kernels import cusparselt, triton_products
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.expanding import expand
from sparseforge_core.runtime.kernels.fragments import from_fragments, to_fragments
from sparseforge_core.runtime.kernels.measure import COLD, copy_bandwidth, seconds
from sparseforge_core.runtime.kernels.nvrtc import compile_ahead
from sparseforge_core.runtime.kernels.plans import Plan
from sparseforge_core.runtime.kernels.rehearsal import random_packed

PARTS = ("check", "vector", "rows", "large")

FOUND: dict[str, Any] = {}


def dense_of(values: Tensor, indices: Tensor) -> Tensor:
    """The dense weight, by scattering."""
    out, kept = values.shape
    places = torch.stack([indices >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(out, kept)
    grouped = torch.zeros(out, kept // 2, 4, dtype=torch.int16, device=values.device)
    grouped.scatter_(-1, places.reshape(out, -1, 2).long(), values.view(torch.int16).reshape(out, -1, 2))
    return grouped.reshape(out, -1).view(values.dtype)


def error(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> float:
    """Relative to the product in float64; NaN where an output was not written."""
    exact = x.double() @ dense.double().T
    exact = exact if bias is None else exact + bias.double()
    return float((y.double() - exact).norm() / exact.norm())


def prepare(jobs: list[tuple[Plan, int, int, torch.dtype]]) -> None:
    """Compile many kernels at once."""
    began = time.perf_counter()
    compile_ahead([(plan.kernel, plan.constants(out, inputs, dtype)) for plan, out, inputs, dtype in jobs], 0)
    print(f"compiled {len(jobs)} kernels in {time.perf_counter() - began:.1f} s", flush=True)


def run_plan(plan: Plan, x: Tensor, fragments: tuple[Tensor, Tensor], out: int, bias: Tensor | None = None) -> Tensor:
    """A product whose output was poisoned before."""
    y = torch.full((x.shape[0], out), float("nan"), dtype=x.dtype, device="cuda")
    plan.run(x, *fragments, bias, y)
    return y


CHECKED = (
    Plan(kernel="gemv", rows=1, warps=4, depth=1, resident=2),
    Plan(kernel="gemv", rows=1, warps=2, depth=2, tiles=2, resident=2),
    Plan(kernel="stream", rows=1, warps=4, depth=8),
    Plan(kernel="stream", rows=8, warps=4, depth=8),
    Plan(kernel="stream", rows=16, warps=2, depth=6),
    Plan(kernel="tiles", rows=8, warps=2, tiles=4, depth=3),
    Plan(kernel="tiles", rows=16, warps=4, tiles=4, depth=2, split=2),
    Plan(kernel="tiles", rows=32, warps=3, tiles=3, depth=2, split=4),
    Plan(kernel="tiles", rows=64, warps=4, tiles=8, depth=2, split=2),
    Plan(kernel="wide", rows=64, warps=4, tiles=4, depth=8, resident=3),
    Plan(kernel="wide", rows=96, warps=4, tiles=4, depth=8, split=2),
    Plan(kernel="wide", rows=128, warps=8, tiles=8, depth=8, split=4),
    Plan(kernel="wide", rows=128, warps=8, tiles=16, depth=7, share=2),
    Plan(kernel="wide", rows=256, warps=8, tiles=8, depth=4, share=2),
)


def check() -> None:
    """Small and odd sizes, both types, poisoned outputs, against float64."""
    shapes = ((16, 256), (48, 576), (80, 2112), (272, 1024))
    prepare([(p, o, i, d) for p in CHECKED for o, i in shapes for d in (torch.bfloat16, torch.float16)])
    for dtype in (torch.bfloat16, torch.float16):
        for out, inputs in shapes:
            packed = random_packed(out, inputs, dtype, "cuda")
            fragments, dense = to_fragments(*packed), dense_of(*packed)
            back = from_fragments(*fragments, inputs)
            same = torch.equal(back[0], packed[0]) and torch.equal(back[1], packed[1])
            same &= torch.equal(expand(*fragments, (out, inputs)), dense)
            bias = torch.randn(out, device="cuda").to(dtype)
            said = []
            for plan in CHECKED:
                for rows in sorted({1, plan.rows // 2 + 1, plan.rows}):
                    if plan.rows == 1 and rows > 1:
                        continue
                    x = torch.randn(rows, inputs, device="cuda").to(dtype)
                    if out == 16:
                        print("running", label(plan), "rows", rows, flush=True)
                    said.append(error(run_plan(plan, x, fragments, out, bias), x, dense, bias))
                    if not said[-1] < 1e-2:
                        print("WRONG", dtype, out, inputs, rows, label(plan), said[-1], flush=True)
            for rows in (1, 5, 40) if inputs == 576 else ():
                x = torch.randn(rows, inputs, device="cuda").to(dtype)
                y = torch.full((rows, out), float("nan"), dtype=dtype, device="cuda")
                triton_products.run(x, *packed, bias, y)
                said.append(error(y, x, dense, bias))
                if not said[-1] < 1e-2:
                    print("WRONG triton", dtype, out, inputs, rows, said[-1])
            print(f"{dtype} {out}x{inputs}: same bits {same}, worst error {max(said):.2e} of {len(said)}", flush=True)
            FOUND[f"check.{dtype}.{out}x{inputs}"] = said


@dataclass(frozen=True, kw_only=True)
class Variant(Plan):
    """A plan with compile-time switches of the kernels turned off."""

    off: tuple[str, ...] = ()

    def constants(self, out: int, inputs: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        return (*super().constants(out, inputs, dtype), *((name, 0) for name in self.off))


def variants(plan: Plan) -> list[Plan]:
    """The same plan without what is on by default."""
    return [Variant(**asdict(plan), off=off) for off in (("EARLY",), ("HINTS",), ("EARLY", "HINTS"))]


class Case:
    """A shape with enough weights that none stays in the cache."""

    def __init__(self, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.name, (self.out, self.inputs) = name, SHAPES[name]
        self.sparse_bytes = self.out * self.inputs * 9 // 8
        self.dense_bytes = self.out * self.inputs * 2
        count = max(2, -(-COLD // self.sparse_bytes))
        packed = [random_packed(self.out, self.inputs, dtype, "cuda") for _ in range(count)]
        self.packed = packed
        self.fragments = [to_fragments(*pair) for pair in packed]
        self.dense = [dense_of(*pair) for pair in packed[: max(2, -(-COLD // self.dense_bytes))]]
        self.dtype = dtype

    def x(self, rows: int) -> Tensor:
        return torch.randn(rows, self.inputs, device="cuda").to(self.dtype)

    def sparse(self, plan: Plan, x: Tensor) -> float:
        y = run_plan(plan, x, self.fragments[0], self.out)
        self.kept = y.clone()
        wrong = float((y.float() - x.float() @ self.dense[0].float().T).norm() / y.float().norm())
        if not wrong < 1e-2:
            raise AssertionError(f"wrong by {wrong}")
        took = seconds([self._call(plan, x, pair, y) for pair in self.fragments])
        for _ in range(5):
            if not torch.equal(run_plan(plan, x, self.fragments[0], self.out), self.kept):
                raise AssertionError("not the same bits again")
        return took

    @staticmethod
    def _call(plan: Plan, x: Tensor, pair: tuple[Tensor, Tensor], y: Tensor) -> Callable[[], object]:
        return lambda: plan.run(x, *pair, None, y)

    def cublas(self, x: Tensor) -> float:
        y = torch.empty(x.shape[0], self.out, dtype=self.dtype, device="cuda")
        return seconds([lambda w=w: torch.mm(x, w.T, out=y) for w in self.dense])

    def dense_triton(self, x: Tensor, config: tuple[int, int, int, bool]) -> float:
        y = torch.empty(1, self.out, dtype=self.dtype, device="cuda")
        dense_gemv(x, self.dense[0], y, config)
        wrong = error(y, x, self.dense[0])
        if not wrong < 1e-2:
            raise AssertionError(f"dense kernel wrong by {wrong}")
        return seconds([lambda w=w: dense_gemv(x, w, y, config) for w in self.dense])


def label(plan: Plan) -> str:
    """A plan in a few letters."""
    off = " without " + " ".join(plan.off) if isinstance(plan, Variant) else ""
    sizes = f"w{plan.warps} d{plan.depth} t{plan.tiles} s{plan.split} h{plan.share} r{plan.resident}"
    return f"{plan.kernel} {plan.rows} {sizes}{off}"


def measured(case: Case, plans: list[Plan], x: Tensor, until: float) -> list[tuple[float, Plan]]:
    """Seconds of each plan that is right, fastest first."""
    found, wrong = [], 0
    for plan in plans:
        if time.perf_counter() > until:
            print("  out of time:", len(plans) - len(found) - wrong, "left")
            break
        try:
            found.append((case.sparse(plan, x), plan))
        except Exception as e:  # noqa: BLE001
            wrong += 1
            print("  FAILED", case.name, x.shape[0], label(plan), repr(e)[:200], flush=True)
            if wrong > 4:
                break
    return sorted(found, key=lambda pair: pair[0])


def vector(name: str, until: float, copied: float) -> None:
    """One row: every dense kernel, then every plan."""
    case = Case(name)
    x = case.x(1)
    y = torch.empty(case.out, dtype=case.dtype, device="cuda")
    dense = {"cublas": case.cublas(x), "mv": seconds([lambda w=w: torch.mv(w, x[0], out=y) for w in case.dense])}
    for config in CONFIGS:
        dense[f"triton {config}"] = case.dense_triton(x, config)
    order = sorted(dense.items(), key=lambda pair: pair[1])
    plans = candidates(case.out, case.inputs, 1)
    prepare([(p, case.out, case.inputs, case.dtype) for p in plans])
    found = measured(case, plans, x, until)
    firsts = [next((p for _, p in found if p.kernel == kernel), None) for kernel in ("gemv", "stream")]
    more = [v for plan in firsts if plan is not None for v in variants(plan)]
    prepare([(p, case.out, case.inputs, case.dtype) for p in more])
    off = measured(case, more, x, until)
    y = torch.empty(1, case.out, dtype=case.dtype, device="cuda")
    plain = seconds([lambda p=p: triton_products.run(x, *p, None, y) for p in case.packed])
    best = order[0][1]
    print(f"{name}: dense " + ", ".join(f"{k} {v * 1e6:.2f}" for k, v in [*order[:3], ("cublas", dense["cublas"])]))
    print(f"  triton 2:4 {plain * 1e6:.2f}")
    for took, plan in found[:6] + [(t, p) for t, p in found if p.kernel != found[0][1].kernel][:3] + found[-1:] + off:
        share = case.sparse_bytes / took / copied
        print(f"  {took * 1e6:7.2f} us  {best / took:.3f}x  {share:.3f} of copy  {label(plan)}", flush=True)
    FOUND[f"vector.{name}"] = {
        "dense": dense, "triton": plain, "sparse": [(t, p.describe()) for t, p in found]
    }  # fmt: skip


def rows(name: str, until: float) -> None:
    """A few rows: cuBLAS, then every plan."""
    case = Case(name)
    sizes = (2, 8, 16, 32, 64, 128)
    plans = {n: candidates(case.out, case.inputs, n) for n in sizes}
    prepare([(p, case.out, case.inputs, case.dtype) for n in sizes for p in plans[n]])
    for n in sizes:
        x = case.x(n)
        dense = case.cublas(x)
        found = measured(case, plans[n], x, until)
        y = torch.empty(n, case.out, dtype=case.dtype, device="cuda")
        plain = seconds([lambda p=p, x=x, y=y: triton_products.run(x, *p, None, y) for p in case.packed])
        best = "  ".join(f"{t * 1e6:.2f} ({dense / t:.2f}x {label(p)})" for t, p in found[:3])
        print(f"{name} rows {n}: dense {dense * 1e6:.2f} triton {plain * 1e6:.2f}  {best}", flush=True)
        FOUND[f"rows.{name}.{n}"] = {
            "dense": dense, "triton": plain, "sparse": [(t, p.describe()) for t, p in found]
        }  # fmt: skip


def large(name: str, until: float) -> None:
    """Many rows: cuBLAS, our plans, cuSPARSELt with each of its algorithms, and what unpacking costs."""
    case = Case(name)
    fragments = case.fragments[:2]
    unpack = seconds([lambda p=p: expand(*p, (case.out, case.inputs)) for p in fragments], least=8)
    share = (case.sparse_bytes + case.dense_bytes) / unpack
    print(f"{name}: expand {unpack * 1e6:.1f} us, {share / 1e12:.2f} TB/s")
    compressed = [torch._cslt_compress(w) for w in case.dense[:2]]
    sizes = (96, 128, 256, 512, 1024, 2048, 4096, 8192)
    plans = {n: candidates(case.out, case.inputs, n) for n in sizes}
    prepare([(p, case.out, case.inputs, case.dtype) for n in sizes for p in plans[n]])
    for n in sizes:
        if time.perf_counter() > until:
            return
        x = case.x(n)
        y = torch.empty(n, case.out, dtype=case.dtype, device="cuda")
        least = 24 if n <= 512 else 6
        dense = seconds([lambda w=w, x=x, y=y: torch.mm(x, w.T, out=y) for w in case.dense[:2]], least=least, replays=7)
        found = []
        for alg in range(24):
            try:
                first = cusparselt.run(x, compressed[0], None, case.out, alg)
                wrong = float((first.float() - torch.mm(x, case.dense[0].T).float()).norm() / first.float().norm())
                if not wrong < 1e-2:
                    print(f"  algorithm {alg} differs by {wrong:.1e}")
                run = [lambda c=c, x=x, a=alg: cusparselt.run(x, c, None, case.out, a) for c in compressed]
                found.append((seconds(run, least=least, replays=5), alg))
            except Exception as e:  # noqa: BLE001
                print(f"  alg {alg}: {str(e)[:80]}")
                break
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            cusparselt.run(x, compressed[0], None, case.out, 0)
        host = (time.perf_counter() - began) / 20
        print(f"  host time of one call {host * 1e6:.0f} us")
        found.sort()
        said = "  ".join(f"{t * 1e6:.1f} ({dense / t:.2f}x alg {a})" for t, a in found[:2])
        ours = measured(case, plans[n], x, until)
        said += "  " + "  ".join(f"{t * 1e6:.1f} ({dense / t:.2f}x {label(p)})" for t, p in ours[:3])
        print(f"{name} rows {n}: dense {dense * 1e6:.1f}  {said}", flush=True)
        sparse = [(t, p.describe()) for t, p in ours]
        FOUND[f"large.{name}.{n}"] = {"dense": dense, "cslt": found, "sparse": sparse}


def main(argv: list[str] | None = None) -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=150.0)
    options = parser.parse_args(argv)
    parts, until = options.part or list(PARTS), time.perf_counter() + options.seconds
    torch.manual_seed(int(time.time()))
    copied = copy_bandwidth()
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {copied / 1e12:.3f} TB/s", flush=True)
    FOUND["copy"] = copied
    for part in parts:
        try:
            if part == "check":
                check()
            for name in SHAPES if part != "check" else ():
                if part == "vector":
                    vector(name, until, copied)
                else:
                    (rows if part == "rows" else large)(name, until)
                torch.cuda.empty_cache()
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        if "OUT" in os.environ and part != "check":
            (Path(os.environ["OUT"]) / f"sweep-{part}.json").write_text(json.dumps(FOUND), encoding="utf-8")
        print(f"after {part}: {options.seconds - (until - time.perf_counter()):.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

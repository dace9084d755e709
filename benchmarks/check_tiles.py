import sys

sys.path.insert(0, ".")
import torch
from benchmarks.kernel_sweep import dense_of, error, label, prepare, run_plan
from sparseforge_core.runtime.kernels.candidates import candidates
from sparseforge_core.runtime.kernels.fragments import to_fragments
from sparseforge_core.runtime.kernels.plans import Plan
from sparseforge_core.runtime.kernels.rehearsal import random_packed

worst = 0.0
plans = [
    Plan(kernel="tiles", rows=r, warps=w, tiles=t, depth=d, split=s)
    for r, w, t, d, s in (
        (8, 4, 4, 3, 1),
        (16, 4, 8, 2, 2),
        (24, 5, 10, 2, 4),
        (40, 9, 9, 2, 1),
        (64, 12, 12, 2, 4),
        (64, 8, 16, 2, 2),
    )
]
for out, inputs in ((272, 1088), (512, 4096)):
    packed = random_packed(out, inputs, torch.bfloat16, "cuda")
    fragments, dense = to_fragments(*packed), dense_of(*packed)
    prepare([(p, out, inputs, torch.bfloat16) for p in plans])
    for plan in plans:
        for rows in (1, plan.rows - 3, plan.rows, 2 * plan.rows - 5):
            x = torch.randn(rows, inputs, device="cuda").bfloat16()
            for again in range(3):
                e = error(run_plan(plan, x, fragments, out), x, dense)
                if not e < 1e-2:
                    print("WRONG", out, inputs, rows, label(plan), e, flush=True)
                worst = max(worst, e if e == e else 9.0)
print("tiles: worst error", worst, flush=True)
sys.exit(int(not worst < 1e-2))

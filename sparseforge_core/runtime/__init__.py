"""Running sparse models: the packed format, its readers, and models that hold packed weights.

Nothing is imported here, so that `reference_reader` needs NumPy alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparseforge_core.runtime.kernels.weight import Mode


def load_sparse(
    path: str | Path, *, dense: bool = False, device: str = "cpu", mode: Mode = "decode"
) -> PreTrainedModel:
    """A transformers model in evaluation mode from a packed export; `loading.load_packed` also says what it did.

    Args:
        path: the folder of the export.
        dense: unpack every weight once, rather than in each forward.
        device: where the model goes when it is complete. On a CUDA device its packed weights are multiplied by our
            kernels; on others each forward unpacks them.
        mode: on a CUDA device, `decode` holds the packed weights alone, `throughput` also forms of them that were
            measured to make large batches faster.

    Raises ExportError or PatternViolation before anything runs if a file is missing, truncated or altered, or if the
    device's kernels cannot run a weight.
    """
    import torch

    from sparseforge_core.runtime.loading import arm, check_device, load_packed

    place = torch.device(device)
    check_device(Path(path), place, dense=dense, mode=mode)
    model, _ = load_packed(Path(path), dense=dense)
    if place.type == "cuda":
        return arm(model, place, mode=mode)  # type: ignore[no-any-return]
    return model.to(place)  # type: ignore[arg-type,return-value]

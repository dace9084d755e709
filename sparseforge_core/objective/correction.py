"""A teacher that follows the text: it takes a step on each batch after it has taught it."""

from __future__ import annotations

from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


@spec("teacher-correction")
class TeacherCorrection:
    """Cross-entropy steps of the teacher beside the student's, on the same batches.

    Minitron corrects its teacher on the new text before it teaches (arXiv 2408.11796), with tokens of its own. Here it
    happens along the way: what a batch is taught with has seen the batches before it and none after, so that nobody
    sees a token that the student does not see, and none twice. It costs a forward and a backward pass of the teacher.
    """

    rate_scale: float = 0.02
    """Factor on the plan's learning rate for all of the teacher's weights. They are whole: small steps do, and large
    ones forget other text (docs/lab-log.md)."""

    def __post_init__(self) -> None:
        if not self.rate_scale > 0:
            raise RecipeError(
                f"correction.rate_scale={self.rate_scale}: must be above 0; leave `correction` out for a fixed teacher"
            )

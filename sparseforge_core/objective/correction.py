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
    every: int = 1
    """Batches from one of its steps to the next; by the others it teaches and learns nothing, which saves its backward
    pass. Its steps are as large as before: where they are rarer, raise `rate_scale`."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"correction.every={self.every}: must be at least 1")
        if not self.rate_scale > 0:
            raise RecipeError(
                f"correction.rate_scale={self.rate_scale}: must be above 0; leave `correction` out for a fixed teacher"
            )

    def is_due(self, step: int) -> bool:
        """Whether the teacher takes a step of its own on the batch of `step`, counted from 1."""
        return step % self.every == 0

"""A teacher that follows the text: it takes a step on each batch after it has taught it."""

from __future__ import annotations

from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import spec


@spec("teacher-correction")
class TeacherCorrection:
    """Steps of the teacher beside the student's, on the same batches: by cross-entropy, where it is held distilled too.

    Minitron corrects its teacher on the new text before it teaches (arXiv 2408.11796), with tokens of its own. Here it
    happens along the way: what a batch is taught with has seen the batches before it and none after, so that nobody
    sees a token that the student does not see, and none twice. It costs a forward and a backward pass of the teacher.

    Cross-entropy alone forgets other text when it is fast. A teacher that is held minimises
    (1 - anchor) CE + anchor KL(as it came || itself): what retraining with distillation makes of a dense model, which
    forgets next to nothing at the student's own rate. That costs a forward pass more, of what it came as.
    """

    rate_scale: float = 0.02
    """Factor on the plan's learning rate for all of the teacher's weights. They are whole: small steps do, and large
    ones forget other text unless it is held (docs/lab-log.md)."""
    every: int = 1
    """Batches from one of its steps to the next; by the others it teaches and learns nothing, which saves its backward
    pass. Its steps are as large as before: where they are rarer, raise `rate_scale`."""
    anchor: float = 0.0
    """Share of the divergence from what it came as in its own loss, in [0, 1); 0 leaves the loss cross-entropy."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"correction.every={self.every}: must be at least 1")
        if not 0.0 <= self.anchor < 1.0:
            raise RecipeError(
                f"correction.anchor={self.anchor}: must lie in [0, 1), 1 excluded: a teacher held by all of its loss "
                "learns nothing; leave `correction` out for a fixed one"
            )
        if not self.rate_scale > 0:
            raise RecipeError(
                f"correction.rate_scale={self.rate_scale}: must be above 0; leave `correction` out for a fixed teacher"
            )

    def is_due(self, step: int) -> bool:
        """Whether the teacher takes a step of its own on the batch of `step`, counted from 1."""
        return step % self.every == 0

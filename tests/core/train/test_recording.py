"""A recorded step leaves what the plain one leaves, and is recorded anew when it is another kind of step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.steps import Shape, bench
from sparseforge_core.errors import RecipeError
from sparseforge_core.execution import RECORDED_FROM, Execution, check_recording, records
from sparseforge_core.methods import (
    AST,
    CAST,
    SRSTE,
    SSTE,
    FrozenMask,
    MagnitudePruning,
    MaskLLM,
    Method,
    SparseForge,
)
from sparseforge_core.objective import Distill
from sparseforge_core.objective.correction import TeacherCorrection
from sparseforge_core.objective.hidden import HiddenMatch
from sparseforge_core.objective.teaching import Sampled
from sparseforge_core.recorded import WARM, on_gpu
from sparseforge_core.run import train_cell
from sparseforge_core.sparsity.masking import SoftMask
from sparseforge_core.train.loop import Progress, train
from sparseforge_core.train.recording import Recording, unrecordable
from tests.core.train.team import cell

SHAPE = Shape(2, 32, 64, 2, 1, 128, True, 4, 8)
STEPS = 9

FROZEN = FrozenMask(prior=MagnitudePruning())
FOLLOWING = Distill(correction=TeacherCorrection())
HELD = Distill(correction=TeacherCorrection(anchor=0.5))
NOW_AND_THEN = Distill(correction=TeacherCorrection(every=2))


class DoneAgain:
    """A recorder without a GPU: a replay does the work again and puts its gradients where the first ones were.

    A graph's addresses are those of its recording, so tensors that are not the first ones are of no use to anybody.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.recordings = 0
        self.beside_recorded = 0

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """What a method does beside the passes: its tensors are its own business, so it is simply done again."""
        self.beside_recorded += 1
        return work

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        work()
        first = [(p, p.grad) for p in self.parameters if p.grad is not None]

        def replay() -> None:
            for parameter, _ in first:
                parameter.grad = None
            work()
            for parameter, gradient in first:
                assert gradient is not None
                assert parameter.grad is not None
                gradient.copy_(parameter.grad)

        return replay


class _EnoughError(Exception):
    """All steps were seen."""


def trained(
    folder: Path, method: Method, objective: Distill, *, recorded: bool, device: str = "cpu", steps: int = STEPS
) -> tuple[list[Tensor], DoneAgain]:
    """Weights of student and teacher after some steps, and what recorded them."""
    made = bench(SHAPE, method, torch.device(device), compiled=device != "cpu", folder=folder, objective=objective)
    recorder = DoneAgain([made.run.model, made.teacher])
    run = made.run
    if recorded:
        capture = recorder if device == "cpu" else on_gpu
        beside = recorder.beside if device == "cpu" else on_gpu
        run = dataclasses.replace(run, recording=Recording(run.model, made.teacher, capture=capture, beside=beside))

    def on_step(progress: Progress) -> None:
        if progress.step == steps:
            raise _EnoughError

    with pytest.raises(_EnoughError):
        train(run, on_step=on_step)
    weights = [p.detach().clone() for module in (run.model, made.teacher) for p in module.parameters()]
    return weights, recorder


@pytest.mark.parametrize("objective", [Distill(), FOLLOWING, HELD])
@pytest.mark.parametrize(
    "method",
    [
        *(
            FROZEN,
            SparseForge(update_every=2),
            SparseForge(mask_storage="int16"),
            CAST(refresh_every=2),
            AST(),
            SRSTE(),
        ),
        *(SSTE(), MaskLLM(prior=None)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_recorded_steps_train_as_plain_ones_do(tmp_path: Path, method: Method, objective: Distill) -> None:
    plain, _ = trained(tmp_path / "plain", method, objective, recorded=False)
    recorded, recorder = trained(tmp_path / "recorded", method, objective, recorded=True)
    assert recorder.recordings == 1
    assert recorder.beside_recorded == (2 if isinstance(method, MaskLLM) else 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_steps_that_take_turns_are_recorded_apart(tmp_path: Path) -> None:
    steps = 2 * WARM + 6
    plain, _ = trained(tmp_path / "plain", FROZEN, NOW_AND_THEN, recorded=False, steps=steps)
    recorded, recorder = trained(tmp_path / "recorded", FROZEN, NOW_AND_THEN, recorded=True, steps=steps)
    assert recorder.recordings == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_another_kind_of_step_is_recorded_anew(tmp_path: Path) -> None:
    made = bench(SHAPE, FROZEN, torch.device("cpu"), compiled=False, folder=tmp_path)
    recorder = DoneAgain([made.run.model])
    recording = Recording(made.run.model, made.teacher, capture=recorder)
    weight = next(made.run.model.parameters())

    def passes(tokens: Tensor) -> dict[str, Tensor]:
        (weight.sum() * tokens.sum()).backward()
        return {"loss": tokens.sum().double()}

    def steps(count: int, objective: Distill | None = None) -> None:
        for _ in range(count):
            weight.grad = None
            tokens = torch.full((2, 3), recorder.recordings + 2)
            loss = recording(objective or Distill(), tokens, passes)["loss"]
            assert loss == tokens.sum()
            assert weight.grad is not None
            assert torch.equal(weight.grad, torch.full_like(weight, float(loss)))

    steps(WARM)
    assert recorder.recordings == 0
    steps(3)
    assert recorder.recordings == 1
    for count, change in enumerate(
        (
            lambda: setattr(made.sites[0].mask, "frozen", False),
            lambda: setattr(made.sites[0].mask.view, "data", made.sites[0].mask.view.data.clone()),
        )
    ):
        change()
        steps(WARM)
        assert recorder.recordings == 1 + count
        steps(2)
        assert recorder.recordings == 2 + count
    steps(WARM + 1, Distill(kl_weight=0.25))
    assert recorder.recordings == 4


def test_a_step_that_would_add_to_other_gradients_is_not_recorded(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    recording = Recording(model, None, capture=DoneAgain([model]))

    def passes(tokens: Tensor) -> dict[str, Tensor]:
        model(tokens.float()).sum().backward()
        return {}

    for _ in range(WARM):
        recording(Distill(), torch.ones(1, 2), passes)
    with pytest.raises(AssertionError, match="gradients would be added"):
        recording(Distill(), torch.ones(1, 2), passes)


def test_what_the_host_takes_part_in_stays_plain() -> None:
    soft = SoftMask(torch.ones(4, 4), transposed=False, slorb=None)
    assert unrecordable(Distill(), [soft]) is None
    assert "drawn by the host" in str(unrecordable(Distill(teacher_logits=Sampled()), [soft]))
    assert "hidden states" in str(unrecordable(Distill(hidden=HiddenMatch()), [soft]))
    soft.law = nn.Identity()
    assert "a way of its own" in str(unrecordable(Distill(), [soft]))
    soft.law.of_tensors = True  # type: ignore[assignment]
    assert unrecordable(Distill(), [soft]) is None


def test_what_cannot_be_recorded_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    gpu, recorded = torch.device("cuda"), Execution(recorded=True)
    recipe = cell().recipe
    check_recording(recipe, recorded, gpu)
    check_recording(recipe, Execution(micro_batch=1), torch.device("cpu"))
    check_recording(recipe, dataclasses.replace(recorded, micro_batch=recipe.train.sequences), gpu)
    for said, execution, device in (
        ("on a GPU, and this is none", recorded, torch.device("cpu")),
        ("leave out --recompute", dataclasses.replace(recorded, recompute=True), gpu),
        ("leave out --micro-batch", dataclasses.replace(recorded, micro_batch=1), gpu),
    ):
        with pytest.raises(RecipeError, match=f"--record: .*{said}"):
            check_recording(recipe, execution, device)
    refused = dataclasses.replace(recorded, recompute=True)  # by a machine with a GPU too
    with pytest.raises(RecipeError, match="--record"):
        train_cell(cell(), tmp_path / "train", tmp_path, execution=refused)
    assert not (tmp_path / "train").exists()


def test_long_runs_on_a_gpu_are_recorded_unless_told_or_impossible(caplog: pytest.LogCaptureFixture) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    long, short = (cell(steps=steps).recipe for steps in (RECORDED_FROM, RECORDED_FROM - 1))
    assert records(long, Execution(), gpu)
    assert not records(short, Execution(), gpu)
    assert records(short, Execution(recorded=True), gpu)
    assert not records(long, Execution(recorded=False), gpu)
    assert not records(long, Execution(), cpu)
    with caplog.at_level("INFO"):
        assert not records(long, Execution(micro_batch=1), gpu)
    assert "leave out --micro-batch" in caplog.text


def test_a_method_of_its_own_is_trained_plain(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.soft = SoftMask(torch.ones(4, 4), transposed=False, slorb=None)
    model.soft.law = nn.Identity()
    recorder = DoneAgain([model])
    recording = Recording(model, None, capture=recorder)
    for _ in range(WARM + 2):
        assert recording(Distill(), torch.ones(1, 2), lambda tokens: {"loss": tokens.sum()})["loss"] == 2.0
    assert recorder.recordings == 0


class _Asking(nn.Module):
    """A layer whose host asks the device which way to go, as a router's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.asked = 0

    def passes(self, tokens: Tensor) -> dict[str, Tensor]:
        self.asked += 1
        loss = (self.weight * tokens).sum()
        loss.backward()
        return {"loss": loss.detach() if loss.item() > 0 else -loss.detach()}


def test_steps_whose_host_asks_stay_plain_unless_recording_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    layer = _Asking()

    @contextlib.contextmanager
    def strict() -> Iterator[None]:
        yield
        raise RuntimeError("called a synchronizing CUDA operation")

    recorder = DoneAgain([layer])
    recording = Recording(layer, None, capture=recorder, required=False, strict=strict)
    for step in range(1, 2 * WARM + 2):
        layer.weight.grad = None
        tokens = torch.full((3,), float(step))
        assert recording(Distill(), tokens, layer.passes)["loss"] == 3.0 * step
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad, tokens), "the step that was tried left no gradient behind"
    assert recorder.recordings == 0
    assert layer.asked == 2 * WARM + 2, "one step was done twice"
    assert caplog.text.count("steps are not recorded") == 1


def test_another_error_of_a_tried_step_is_none_of_recordings(tmp_path: Path) -> None:
    done: list[Tensor] = []

    def passes(tokens: Tensor) -> dict[str, Tensor]:
        done.append(tokens)
        if len(done) == WARM:
            raise RuntimeError("shapes do not fit")
        return {}

    recording = Recording(nn.Linear(2, 2), None, required=False, strict=contextlib.nullcontext)
    for _ in range(WARM - 1):
        recording(Distill(), torch.ones(1, 2), passes)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        recording(Distill(), torch.ones(1, 2), passes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_questions_are_noticed_on_a_gpu() -> None:
    layer = _Asking().cuda()
    recording = Recording(layer, None, required=False)
    for step in range(1, 2 * WARM):
        layer.weight.grad = None
        tokens = torch.full((3,), float(step), device="cuda")
        assert float(recording(Distill(), tokens, layer.passes)["loss"]) == 3.0 * step
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad, tokens)
    assert recording._never
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("objective", [Distill(), FOLLOWING, HELD, NOW_AND_THEN])
def test_recorded_steps_train_as_plain_ones_do_on_a_gpu(tmp_path: Path, objective: Distill) -> None:
    """Products of bfloat16 are added in the same order by the same kernels; the embedding's gradient may not be."""
    found = [
        trained(tmp_path / str(recorded), FROZEN, objective, recorded=recorded, device="cuda", steps=2 * WARM + 6)[0]
        for recorded in (False, True)
    ]
    for plain, recorded in zip(*found, strict=True):
        torch.testing.assert_close(recorded.float(), plain.float(), rtol=1e-3, atol=1e-5)

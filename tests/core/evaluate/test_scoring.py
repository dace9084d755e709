"""Shared contexts, joined rows and any batch size give the log-likelihoods of each request run by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.scoring import Request, Scorer, packs
from tests.tiny import ARCHITECTURES, EVERY_ARCHITECTURE, VOCABULARY, tiny_model

LENGTH = 24
MODELS: dict[str, Any] = {}

ids = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=20)
item = st.tuples(
    ids, st.lists(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=4)
)


def model(architecture: str) -> Any:
    if architecture not in MODELS:
        MODELS[architecture] = tiny_model(architecture)
    return MODELS[architecture]


def alone(model: Any, request: Request) -> tuple[float, bool]:
    """One request, one forward, the formula written out."""
    tokens = (request.context + request.continuation)[-(LENGTH + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    own = logits[-len(request.continuation) :]
    wanted = torch.tensor(request.continuation)
    return float(own.gather(1, wanted[:, None]).sum()), bool((own.argmax(1) == wanted).all())


def scored(model: Any, requests: list[Request], batch_size: int, *, shared: bool = True) -> list[tuple[float, bool]]:
    found: dict[int, tuple[float, bool]] = {}
    for batch in Scorer(model, batch_size=batch_size, max_length=LENGTH, shared=shared).score(requests):
        assert not found.keys() & batch.keys()
        found |= batch
    return [found[index] for index in range(len(requests))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=8, deadline=None)
@given(items=st.lists(item, min_size=1, max_size=6), batch_size=st.sampled_from([1, 2, 4, 16]))
def test_every_layout_gives_what_each_request_gives_alone(
    architecture: str, items: list[tuple[list[int], list[list[int]]]], batch_size: int
) -> None:
    requests = [Request(context, choice, group) for group, (context, choices) in enumerate(items) for choice in choices]
    assert packs(model(architecture), LENGTH)
    for shared in (True, False):
        for (value, greedy), request in zip(
            scored(model(architecture), requests, batch_size, shared=shared), requests, strict=True
        ):
            expected = alone(model(architecture), request)
            assert value == pytest.approx(expected[0], abs=2e-4)
            assert greedy == expected[1]


def test_a_batch_holds_no_more_tokens_than_its_size_times_the_longest_request() -> None:
    seen: list[int] = []
    subject = model("llama")
    hook = subject.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    requests = [Request([1] * n, [2, 3] * c, n) for n in range(1, 20) for c in (1, 2)]
    scored(subject, requests, 4)
    hook.remove()
    longest = max(len(r.context) + len(r.continuation) - 1 for r in requests)
    assert max(seen) <= 4 * longest
    assert sum(seen) < sum(len(r.context) + len(r.continuation) - 1 for r in requests)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_every_declared_architecture_scores_as_it_does_alone(architecture: str) -> None:
    subject = tiny_model(architecture)
    requests = [Request(list(range(1, n)), [n, 2, c][: c + 1], n) for n in (3, 9, 17, 24) for c in range(3)]
    for (value, greedy), request in zip(scored(subject, requests, 2), requests, strict=True):
        assert (value, greedy) == (pytest.approx(alone(subject, request)[0], abs=2e-4), alone(subject, request)[1])


def test_what_a_joined_row_would_change_is_run_alone() -> None:
    windowed = tiny_model("llama")
    windowed.config.sliding_window = LENGTH
    assert packs(windowed, LENGTH)
    windowed.config.sliding_window = LENGTH - 1
    assert not packs(windowed, LENGTH)
    assert not packs(tiny_model("bloom"), LENGTH), "its positions are distances in the row"


def test_a_long_context_loses_its_left_and_a_long_answer_is_refused() -> None:
    scorer = Scorer(model("llama"), batch_size=2, max_length=LENGTH)
    request = Request(list(range(1, 41)), [5, 6], 0)
    (batch,) = scorer.score([request])
    assert scorer.truncated == 1
    assert batch[0][0] == pytest.approx(alone(model("llama"), request)[0], abs=1e-4)
    with pytest.raises(DataError, match="a continuation has 25 tokens and the model accepts at most 24"):
        list(scorer.score([Request([1], [2] * 25, 0)]))

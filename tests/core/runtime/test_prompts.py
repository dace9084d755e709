"""Prompts: filled up they say what they say alone, and as a graph, where their size came again, the same."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseforge_core.errors import ExportError
from sparseforge_core.runtime import load_sparse
from sparseforge_core.runtime.decode import prompts
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.on_kernels import on_kernels
from sparseforge_core.runtime.decode.parts import Parts, parts_of
from sparseforge_core.runtime.decode.products import reference
from sparseforge_core.runtime.decode.prompts import Prompts
from sparseforge_core.runtime.kernels import cusparselt, support
from sparseforge_core.runtime.kernels.weight import Mode
from tests.core.runtime.exports import packed_export
from tests.core.runtime.test_decode import DRIVEN, lively, said, wide_model
from tests.core.runtime.test_kernels import packed_weight
from tests.tiny import tokens

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: graphs of prompts, and captures of cuSPARSELt, not run"
)


@functools.cache
def exact_parts(name: str) -> Parts:
    """In float64, where what is added in another order differs by nothing that matters."""
    return parts_of(lively(name).double(), reference)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(DRIVEN)), batch=st.integers(1, 3), length=st.integers(1, 48), seed=st.integers(0, 99)
)
def test_a_filled_prompt_says_what_it_says_alone(name: str, batch: int, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    prompt, before = torch.randint(0, 64, (batch, length)), torch.randint(0, 64, (batch, 50))
    alone, filled = (Decoder(exact_parts(name), batch=batch, capacity=60, fill=fill) for fill in (False, True))
    for decoder in (alone, filled):
        decoder.prefill(before)  # a longer one, of which nothing may be left
        decoder.prefill(prompt)
        for _ in range(6):
            decoder.step()
    torch.testing.assert_close(filled.logits, alone.logits, rtol=1e-9, atol=1e-9)
    seen = slice(0, length + 6)
    assert torch.equal(filled.found[:, length : length + 7], alone.found[:, length : length + 7])
    for one, other in zip(filled.cache.keys + filled.cache.values, alone.cache.keys + alone.cache.values, strict=True):
        torch.testing.assert_close(one[:, :, seen], other[:, :, seen], rtol=1e-9, atol=1e-9)


def test_texts_are_the_same_filled_and_alone() -> None:
    parts = parts_of(lively("qwen2"), reference)
    alone, filled = (Decoder(parts, capacity=60, fill=fill) for fill in (False, True))
    for length in (3, 9, 17, 33):
        prompt = tokens(1, length)
        text = said(alone, prompt, 20)
        assert said(filled, prompt, 20) == text
        assert len(set(text)) > 3


def test_what_fills_a_prompt_up_cannot_spoil_it() -> None:
    """Even a filling token whose state overflows: a share of 0 of what is not finite would not be 0."""
    model = lively("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("inf")
    prompt = torch.randint(1, 64, (2, 17))
    alone, filled = (Decoder(parts_of(model, reference), batch=2, capacity=60, fill=fill) for fill in (False, True))
    assert filled.prompts.size(17) == 24
    torch.testing.assert_close(filled.prefill(prompt), alone.prefill(prompt))
    assert bool(filled.finite)


@given(length=st.integers(1, 20000), capacity=st.integers(1, 20000))
def test_sizes_are_near_and_within_the_cache(length: int, capacity: int) -> None:
    length = min(length, capacity)
    size = Prompts(exact_parts("llama"), 1, capacity, fill=True, recorder=None).size(length)
    assert length <= size <= min(capacity, max(length + 7, length * 17 // 16 + 1))


def test_sizes_are_few() -> None:
    made = Prompts(exact_parts("llama"), 1, 8192, fill=True, recorder=None)
    assert len({made.size(length) for length in range(1, 8193)}) == 16 + 6 * 16  # in eights up to 128, then six octaves
    assert Prompts(exact_parts("llama"), 1, 8192, fill=False, recorder=None).size(1001) == 1001


class Notes:
    """Records by remembering the work, and says that it holds what it is told to."""

    def __init__(self, held: int) -> None:
        self.held, self.records = held, 0

    def record(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        work()
        self.records += 1
        return work, self.held


def test_a_size_is_recorded_when_it_comes_again_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Notes] = []

    def recorder() -> Notes:
        made.append(Notes(30))
        return made[-1]

    parts = exact_parts("llama")
    sizes, done = Prompts(parts, 1, 64, fill=True, recorder=recorder), []
    row = sizes.needed_bytes(1)
    monkeypatch.setattr(prompts, "BUDGET", 40 * row)

    def passes(size: int) -> None:
        sizes.run(size, functools.partial(done.append, size))

    passes(16)
    assert not made, "the first prompt of a size gains nothing by a graph"
    for _ in range(3):
        passes(16)
    assert (done, sizes.recorded, made[0].records, sizes.held_bytes) == ([16] * 4, (16,), 1, 30)
    for size in (8, 8, 32, 32):
        passes(size)
    assert sizes.recorded == (8, 16, 32), "a smaller one finds its memory, and the larger one still fits"
    assert sizes.held_bytes == 90
    sizes.held_bytes = 10 * row
    passes(40), passes(40)
    assert sizes.recorded == (40,), "the budget is kept by beginning anew"
    assert len(made) == 2, "and with another pool of memory"
    passes(16)
    assert sizes.recorded == (16, 40), "what was met before is recorded when it comes next"
    for _ in range(3):
        passes(48)
    assert 48 not in sizes.recorded, "beyond the budget alone"
    assert sizes.size(41) == 41, "and then it is not filled up"
    sizes.forget()
    assert (sizes.recorded, sizes.held_bytes) == ((), 0)


def test_a_short_prompt_of_a_new_size_takes_the_next_one_that_is_recorded_and_says_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, made = exact_parts("llama"), Notes(0)
    alone, filled = Decoder(parts, capacity=60), Decoder(parts, capacity=60, fill=True)
    sizes = filled.prompts = Prompts(parts, 1, 60, fill=True, recorder=lambda: made)
    filled.prefill(tokens(1, 40)), filled.prefill(tokens(1, 40))
    assert sizes.recorded == (40,)
    torch.testing.assert_close(filled.prefill(tokens(1, 13)), alone.prefill(tokens(1, 13)))
    assert (sizes.recorded, made.records) == ((40,), 1), "the graph of 40 tokens did"
    torch.testing.assert_close(filled.prefill(tokens(1, 14)), alone.prefill(tokens(1, 14)))
    assert (sizes.recorded, made.records) == ((16, 40), 2), "what comes again is recorded in its own size"
    monkeypatch.setattr(prompts, "SHORT", 39)
    assert sizes.size(20) == 24, "beyond that a device computes longer than a host launches"
    assert Prompts(parts, 2, 60, fill=True, recorder=lambda: made).size(9) == 16, "nothing is recorded yet"


def test_who_is_warm_has_a_short_prompt_recorded_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, made = exact_parts("llama"), Notes(0)
    decoder = Decoder(parts, capacity=60, fill=True)
    decoder.warm()
    assert decoder.prompts.recorded == (), "a CPU records nothing"
    decoder.prompts = Prompts(parts, 1, 60, fill=True, recorder=lambda: made)
    monkeypatch.setattr(decoder, "_wanted", True)
    decoder.warm()
    assert decoder.prompts.recorded == (60,)
    said = decoder.prefill(tokens(1, 13))
    assert (decoder.prompts.recorded, made.records) == ((60,), 1)
    torch.testing.assert_close(said, Decoder(parts, capacity=60).prefill(tokens(1, 13)))


def test_a_prompt_without_memory_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(exact_parts("llama"), capacity=60, fill=True)
    monkeypatch.setattr(support, "free_memory", lambda device: 1000)
    with pytest.raises(ExportError, match=r"a pass over 1 x 24 tokens needs .* ask for fewer tokens"):
        decoder.prefill(tokens(1, 20))
    monkeypatch.undo()
    assert bool(torch.isfinite(decoder.prefill(tokens(1, 20))).all())


def test_a_decoder_goes_when_it_is_let_go() -> None:
    """Its memory is needed for the next one at once, so nothing of its own may hold it until the collector comes."""
    decoder = Decoder(exact_parts("llama"), capacity=60, fill=True)
    decoder.prompts.run(8, lambda: None)
    decoder.prefill(tokens(1, 20))
    kept = weakref.ref(decoder)
    gc.disable()
    del decoder
    there = kept()
    gc.enable()
    assert there is None


def test_no_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST", 2)
    sizes = Prompts(exact_parts("llama"), 1, 64, fill=True, recorder=lambda: Notes(0))
    for size in (32, 32, 24, 24, 16, 16):
        sizes.run(size, lambda: None)
    assert sizes.recorded == (16,)


def test_a_weight_that_is_unpacked_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = exact_parts("llama")
    sizes = Prompts(parts, 1, 512, fill=True, recorder=None)
    packed = {rows: sizes.needed_bytes(rows) for rows in (64, 65)}
    down = parts.blocks[0].down
    monkeypatch.setattr(down, "unpacks", lambda rows: rows > 64)
    assert sizes.needed_bytes(64) == packed[64], "where the packed weight is multiplied it is nothing"
    assert sizes.needed_bytes(65) == packed[65] + down.out * down.inputs * 8


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_cusparselt_is_replayed_with_new_inputs(dtype: torch.dtype) -> None:
    """A launch keeps nothing of the host's: neither factors, nor a plan that is let go, nor a workspace in use."""
    packed = packed_weight(128, 512, dtype, device="cuda")
    dense, ran = packed.dense().double(), 0
    compressed = cusparselt.compress(packed.dense())
    for algorithm in range(cusparselt.ALGORITHMS):
        x = torch.randn(200, 512, device="cuda").to(dtype)
        try:
            cusparselt.run(x, compressed, None, 128, algorithm)
        except ExportError:  # an algorithm that the library does not have for these sizes
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cusparselt.run(x, compressed, None, 128, algorithm)
        cusparselt.plan.cache_clear()
        for _ in range(3):
            cusparselt.run(torch.randn_like(x), compressed, None, 128, algorithm)  # another plan, another workspace
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert off(y, x.double() @ dense.T) < 1e-2, algorithm
        ran += 1
    assert ran >= 3


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", ["decode", "throughput", "dense"])
def test_on_a_gpu_prompts_that_come_again_are_graphs_and_say_the_same(
    mode: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseforge_core.runtime.decode import fast

    monkeypatch.setattr("sparseforge_core.runtime.loading.LARGE_ROWS", (128,))  # what is measured when it is armed
    monkeypatch.setattr("sparseforge_core.runtime.decode.on_kernels.LARGE_ROWS", (128,))
    folder = packed_export(wide_model(), tmp_path)
    plainly = load_sparse(folder, dense=True).float().to("cuda")
    if mode == "dense":
        parts = parts_of(load_sparse(folder, dense=True).to("cuda"), reference)
    else:
        kept: Mode = "throughput" if mode == "throughput" else "decode"
        parts = parts_of(load_sparse(folder, device="cuda", mode=kept), on_kernels(fast))
    repeating = Decoder(parts, batch=batch, capacity=160, steps=fast)
    launched = Decoder(parts, batch=batch, capacity=160, steps=fast, graph=False, fill=True)
    for length in (97, 150, 104, 60, 99, 150, 60, 103, 150, 60, 1, 100):  # sizes 104, 152 and 64 in turn, some thrice
        prompt = tokens(batch, length).cuda()
        logits = repeating.prefill(prompt)
        assert off(logits, launched.prefill(prompt)) < 2e-3, length
        assert off(logits, plainly(prompt).logits[:, -1]) < 2e-2, length
        assert bool(repeating.finite)
        for layer in range(len(parts.blocks)):
            keys, expected = repeating.cache.keys[layer], launched.cache.keys[layer]
            assert off(keys[:, :, :length], expected[:, :, :length]) < 2e-3
            assert not keys[:, :, length : repeating.prompts.size(length)].any()
        for _ in range(3):
            following = launched.tokens.clone()
            repeating.put(following)
            repeating.step()
            launched.step()
            assert off(repeating.logits, launched.logits) < 1e-2, length
    assert repeating.prompts.recorded == (64, 104, 152)
    assert 0 < repeating.prompts.held_bytes < prompts.BUDGET
    assert launched.prompts.recorded == ()


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_graphs_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseforge_core.runtime.decode import fast

    parts = parts_of(lively("llama").to(torch.bfloat16).cuda(), reference)
    decoder = Decoder(parts, batch=2, capacity=60, steps=fast)
    for length in (*(20,) * 3, *(40,) * 3):
        decoder.prefill(tokens(2, length).cuda())
    assert decoder.prompts.recorded == (24, 40)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = decoder.prompts.held_bytes
    decoder.prompts.forget()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - held
    monkeypatch.setattr(prompts, "free_memory", lambda device: 0)
    expected = decoder.prefill(tokens(2, 40).cuda()).clone()
    assert decoder.prompts.recorded == (), "without memory the host launches the prompt"
    monkeypatch.undo()
    assert torch.equal(decoder.prefill(tokens(2, 40).cuda()), expected)
    assert decoder.prompts.recorded == (40,)

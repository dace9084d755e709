"""The static cache: token by token what transformers generates, on every model that it says it drives, and no other."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparseforge_core.errors import ExportError, UnsupportedModel
from sparseforge_core.runtime import load_sparse
from sparseforge_core.runtime.decode import plain
from sparseforge_core.runtime.decode.loop import Decoder, decode
from sparseforge_core.runtime.decode.on_kernels import on_kernels
from sparseforge_core.runtime.decode.parts import Sizes, parts_of, refusal
from sparseforge_core.runtime.decode.products import reference
from sparseforge_core.runtime.generate import Speaker
from sparseforge_core.runtime.kernels import KernelWeight, choices
from sparseforge_core.runtime.kernels.weight import Mode
from sparseforge_core.runtime.linear import KernelLinear, SparseLinear
from sparseforge_core.runtime.loading import arm
from sparseforge_core.runtime.semi_structured import load_semi_structured
from sparseforge_core.sparsity.patterns import GroupPattern, nm
from tests.core.runtime.exports import TWO_FOUR, packed_export, pruned_model
from tests.tiny import tiny_model, tokens

ROOT = Path(__file__).resolve().parents[3]

ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: the graph of a step, its compiled Triton kernels, torch's semi-structured products not run",
)

DRIVEN = {
    "llama": {},
    "llama-grouped": {"num_key_value_heads": 1},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}


def lively(name: str) -> Any:
    """A tiny random model that does not repeat itself: weights of unit size, a head of its own."""
    source = tiny_model(name.partition("-")[0])
    config = source.config
    for field, value in {**DRIVEN[name], "tie_word_embeddings": False}.items():
        setattr(config, field, value)
    torch.manual_seed(1)
    model = type(source)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model


def said(decoder: Decoder, prompt: torch.Tensor, count: int, **how: Any) -> list[int]:
    return list(itertools.chain.from_iterable(decode(decoder, prompt, count, **how)))


@pytest.mark.parametrize("name", DRIVEN)
def test_token_by_token_as_transformers(name: str) -> None:
    model = lively(name)
    decoder = Decoder(parts_of(model, reference), capacity=50)
    prompt = tokens(1, 9)
    options = {"max_new_tokens": 40, "eos_token_id": -1, "attention_mask": torch.ones_like(prompt)}
    greedy = model.generate(prompt, do_sample=False, **options)[0, 9:].tolist()
    assert said(decoder, prompt, 40) == greedy
    assert len(set(greedy)) > 3, "a text of one token would prove little"
    torch.manual_seed(3)
    drawn = model.generate(prompt, do_sample=True, top_k=0, top_p=1.0, temperature=1.3, **options)[0, 9:].tolist()
    sampled = said(decoder, prompt, 40, temperature=1.3, generator=torch.Generator().manual_seed(3))
    assert sampled == drawn
    assert sampled != greedy


def test_a_text_ends_where_the_model_ends_it() -> None:
    decoder = Decoder(parts_of(lively("llama"), reference), capacity=60)
    whole = said(decoder, tokens(1, 9), 40)
    end = whole[25]
    first = whole.index(end)
    for look in (1, 7, 16, 100):
        assert said(decoder, tokens(1, 9), 40, ends={end}, look=look) == whole[:first]
    assert said(decoder, tokens(1, 9), 40) == whole, "a decoder begins anew with each prompt"


def test_rows_of_a_batch_do_not_meet() -> None:
    parts = parts_of(lively("qwen3"), reference)
    several = Decoder(parts, batch=3, capacity=20)
    prompts = tokens(3, 9)
    several.prefill(prompts)
    for _ in range(10):
        several.step()
    for row in range(3):
        assert several.found[row, 9:20].tolist() == said(Decoder(parts, capacity=20), prompts[row : row + 1], 11)


def test_a_packed_model_speaks_as_the_dense_one(tmp_path: Path) -> None:
    folder = packed_export(pruned_model("llama"), tmp_path)
    ids, ends = tokens(1, 6), {0}
    texts = {}
    for how, model in (("packed", load_sparse(folder)), ("dense", load_sparse(folder, dense=True))):
        for cache in ("static", "ordinary"):
            speaker = Speaker(model, cache)  # type: ignore[arg-type]
            texts[how, cache] = list(itertools.chain.from_iterable(speaker.speak(ids, 20, ends=ends)))
            sampled = speaker.speak(ids, 20, ends=ends, temperature=1.0, seed=4)
            texts[how, cache] += list(itertools.chain.from_iterable(sampled))
    assert len({tuple(text) for text in texts.values()}) == 1


def test_weights_of_one_input_are_joined_and_shared(tmp_path: Path) -> None:
    """The kernels' side on the CPU: each row as before, the model's modules views of the joined weight."""
    model: Any = load_sparse(packed_export(pruned_model("llama"), tmp_path))
    expected = said(Decoder(parts_of(model, reference), capacity=30), tokens(1, 6), 20)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            model.set_submodule(name, KernelLinear(KernelWeight.of(module.packed), module.bias))
    before = model(tokens()).logits
    parts = parts_of(model, on_kernels(plain))
    assert said(Decoder(parts, capacity=30), tokens(1, 6), 20) == expected
    assert torch.equal(model(tokens()).logits, before), "the model itself goes on working"
    block, layer = parts.blocks[0], model.model.layers[0].self_attn
    whole = block.qkv.kernel.values  # type: ignore[attr-defined]
    assert whole.shape[0] == 3 * 32
    assert layer.k_proj.kernel.values.data_ptr() == whole[32:].data_ptr()
    assert block.qkv.nbytes == 3 * 32 * (16 * 4 + 4)


@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    [
        ("gpt2", {}, "drives LlamaForCausalLM, .* not GPT2LMHeadModel"),
        ("opt", {}, "not OPTForCausalLM"),
        ("mistral", {"sliding_window": 16}, "sliding window, .* one of 16 tokens"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rotary type 'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "gated by silu, and this model's by gelu"),
        ("llama", {"head_dim": 24}, "this model's have 24"),
    ],
)
def test_what_it_cannot_drive_is_said(architecture: str, changes: dict[str, Any], sentence: str) -> None:
    model = tiny_model(architecture)
    for name, value in changes.items():
        setattr(model.config, name, value)
    why = refusal(model)
    assert why is not None
    with pytest.raises(UnsupportedModel, match=sentence):
        Speaker(model, "static")
    assert Speaker(model).cache == f"ordinary ({why})"


@pytest.mark.parametrize(
    ("pattern", "dtype", "sentence"),
    [
        (nm(4, 8), torch.bfloat16, r"site model.layers.0.self_attn.q_proj.weight is 4:8, not 2:4"),
        (TWO_FOUR, torch.float32, r"site model.layers.0.self_attn.q_proj.weight: .* take bfloat16 and float16"),
        (TWO_FOUR, torch.bfloat16, r"site .*q_proj.weight: a weight 32x32 does not divide"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_anything_moves(
    pattern: GroupPattern, dtype: torch.dtype, sentence: str, tmp_path: Path
) -> None:
    folder = packed_export(pruned_model("llama", pattern, dtype), tmp_path, pattern)
    with pytest.raises(ExportError, match=sentence):
        load_sparse(folder, device="cuda")
    model: Any = load_sparse(folder)
    with pytest.raises(ExportError, match=sentence):
        arm(model, torch.device("cuda"))
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert not any(isinstance(module, KernelLinear) for module in model.modules())


def test_requests_that_do_not_fit_are_refused() -> None:
    model = lively("llama")
    parts = parts_of(model, reference)
    with pytest.raises(ExportError, match="65 tokens exceed the model's 64"):
        Decoder(parts, capacity=65)
    decoder = Decoder(parts, capacity=8)
    with pytest.raises(ExportError, match="2 x 3 tokens does not fit 1 x 8"):
        decoder.prefill(tokens(2, 3))
    for cache in ("static", "ordinary"):
        with pytest.raises(ExportError, match="60 prompt tokens and 5 more exceed"):
            Speaker(model, cache).speak(tokens(1, 60), 5, ends=set())  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="unknown cache 'statik'"):
        Speaker(model, "statik")  # type: ignore[arg-type]


def test_a_logit_that_is_not_finite_is_no_token() -> None:
    model = lively("llama")
    model.model.norm.weight.data.fill_(float("inf"))
    for cache in ("static", "ordinary"):
        with pytest.raises(ExportError, match="a logit is not finite"):
            list(Speaker(model, cache).speak(tokens(1, 4), 20, ends=set()))  # type: ignore[arg-type]


def test_sizes_count_the_cache() -> None:
    sizes = Sizes(32, 4096, 32, 32, 128, 11008, 32000, 4096, 1e-5)
    assert sizes.qkv == 12288
    assert sizes.cache_bytes(2, 1024, 2) == 2 * 2 * 32 * 1024 * 4096 * 2


INTERPRETED = """
import torch
from sparseforge_core.runtime.decode import fast, plain
from sparseforge_core.runtime.decode.loop import Decoder
from sparseforge_core.runtime.decode.parts import parts_of
from sparseforge_core.runtime.decode.products import reference
from tests.core.runtime.test_decode import lively
torch.manual_seed(0)
x, weight = torch.randn(3, 5, 96), torch.randn(96)
torch.testing.assert_close(fast.norm(x, weight, 1e-6), plain.norm(x, weight, 1e-6))
torch.testing.assert_close(fast.gated(x), plain.gated(x))
branch, row, added = torch.randn(40, 6), torch.randn(96), torch.randn(40)
for more in (added, None):
    torch.testing.assert_close(fast.through_branch(row, branch, more), plain.through_branch(row, branch, more))
fast.SHORTEST = 16  # so that a short text has several stretches, and the last of them adds up
for name, fast.CROWDED in (("qwen3", 264), ("llama-grouped", 264), ("qwen3", 0), ("llama-grouped", 0)):
    parts = parts_of(lively(name), reference)
    sides = [Decoder(parts, batch=2, capacity=40, steps=steps, fill=steps is fast) for steps in (plain, fast)]
    prompt = torch.randint(0, 64, (2, 18))
    for turn in range(3):
        for side in sides:
            side.prefill(prompt) if turn == 0 else side.step()
        for one, other in zip(*((s.logits, s.cache.keys[1], s.cache.values[1]) for s in sides)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(sides[0].found, sides[1].found)
    assert not sides[1].cache.scratch["counters"].any()
print("agreed")
"""


@pytest.mark.slow
def test_the_triton_steps_agree_with_the_plain_ones() -> None:
    """In Triton's interpreter, which needs no GPU and has to be asked for before anything is imported."""
    pytest.importorskip("triton", reason="no Triton, whose interpreter runs the kernels of decode/fast.py")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.stdout == "agreed\n", run.stderr


def wide_model() -> Any:
    """One that the kernels take: inputs in 64s, outputs in 16s."""
    from sparseforge_core.models.sites import assign_patterns
    from sparseforge_core.sparsity.patterns import top_mask
    from tests.tiny import sites_of

    model = tiny_model("llama", width=256, heads=4, positions=256).to(torch.bfloat16)
    with torch.no_grad():
        for site in assign_patterns(sites_of(model), TWO_FOUR):
            matrix = site.matrix(site.weight)
            matrix.copy_(torch.where(top_mask(matrix.abs().float(), TWO_FOUR), matrix, torch.zeros_like(matrix)))
    return model


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["decode", "throughput"])
def test_on_a_gpu_the_step_is_one_graph_and_says_the_same(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseforge_core.runtime.loading.LARGE_ROWS", (128,))  # what is measured when it is armed
    monkeypatch.setattr("sparseforge_core.runtime.decode.on_kernels.LARGE_ROWS", (128,))
    folder = packed_export(wide_model(), tmp_path)
    plainly = load_sparse(folder, dense=True).float().to("cuda")
    model = load_sparse(folder, device="cuda", mode=mode)
    prompt = tokens(1, 100).cuda()
    near = (model(prompt).logits.float() - plainly(prompt).logits).norm() / plainly(prompt).logits.norm()
    assert near < 2e-2
    speaker = Speaker(model)
    assert speaker.cache == "static"
    weight = speaker.parts.blocks[0].qkv.kernel  # type: ignore[union-attr,attr-defined]
    assert weight.forms == (choices.forms_for(768, 256, torch.bfloat16, 0) if mode == "throughput" else choices.NONE)
    text = list(itertools.chain.from_iterable(speaker.speak(prompt, 100, ends=set())))
    logits = plainly(torch.cat((prompt, torch.tensor([text], device="cuda")), 1)).logits[0, 99:-1]
    lost = logits.max(-1).values - logits.gather(1, torch.tensor(text, device="cuda")[:, None])[:, 0]
    assert len(text) == 100
    assert lost.max() < 0.05 * logits.std(), "each token is the likeliest, or as near to it as the type rounds"


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_torchs_semi_structured_tensors_say_the_same(tmp_path: Path) -> None:
    folder = packed_export(wide_model(), tmp_path)
    plainly = load_sparse(folder, dense=True).float().to("cuda")
    model, refused = load_semi_structured(folder)
    assert refused == {}
    prompt = tokens(2, 64).cuda()
    expected = plainly(prompt).logits
    assert (model(prompt).logits.float() - expected).norm() < 2e-2 * expected.norm()


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_too_large_a_cache_is_refused_before_it_is_made() -> None:
    parts = parts_of(lively("llama").to(torch.bfloat16).cuda(), reference)
    huge = dataclasses.replace(parts, sizes=dataclasses.replace(parts.sizes, positions=2**40))
    with pytest.raises(ExportError, match="GiB free; ask for fewer tokens"):
        Decoder(huge, capacity=2**40)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices: a model on the second not run")
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["decode", "throughput"])
def test_on_the_second_gpu_it_says_what_it_says_on_the_first(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseforge_core.runtime.loading.LARGE_ROWS", (128,))
    monkeypatch.setattr("sparseforge_core.runtime.decode.on_kernels.LARGE_ROWS", (128,))
    folder, prompt = packed_export(wide_model(), tmp_path), tokens(1, 100)
    texts = []
    for device in ("cuda:0", "cuda:1"):
        speaker = Speaker(load_sparse(folder, device=device, mode=mode))
        said_by = speaker.speak(prompt.to(device), 40, ends=set())
        texts.append(list(itertools.chain.from_iterable(said_by)))
    assert torch.cuda.current_device() == 0
    assert texts[0] == texts[1]

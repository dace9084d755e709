"""A packed export runs as the trained model does, bit for bit, or is refused with a sentence."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseforge_core.checkpoint import BRANCHES
from sparseforge_core.errors import ExportError, SparseForgeError, UnsupportedModel
from sparseforge_core.models.hub import from_pretrained
from sparseforge_core.runtime import load_sparse, reference_reader
from sparseforge_core.runtime.generate import generate
from sparseforge_core.runtime.linear import SparseLinear
from sparseforge_core.runtime.loading import extra_bytes, load_packed, resident_bytes
from sparseforge_core.runtime.manifest import MANIFEST, SUMS, WEIGHTS, Entry, write_sums
from sparseforge_core.runtime.packed import Layout
from sparseforge_core.runtime.semi_structured import load_semi_structured, refusal
from sparseforge_core.sparsity.patterns import Pattern, nm
from tests.core.runtime.exports import logits_of, packed_export, pruned_model
from tests.tiny import tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_export(pruned_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("architecture", "pattern", "dtype", "experts"),
    [
        ("llama", nm(2, 4), torch.float32, False),
        ("llama", nm(4, 8), torch.bfloat16, False),
        ("opt", nm(1, 4), torch.bfloat16, False),
        ("gpt2", nm(2, 4), torch.float32, False),
        ("gpt2", nm(6, 8), torch.bfloat16, False),
        ("deepseek_moe", nm(2, 4), torch.float32, True),
        ("mixtral", nm(2, 4), torch.bfloat16, True),
        ("gpt_oss", nm(2, 4), torch.float32, True),
        ("phi3", nm(2, 4), torch.float32, False),
    ],
)
def test_logits_are_those_of_the_trained_model(
    architecture: str, pattern: Pattern, dtype: torch.dtype, experts: bool, tmp_path: Path
) -> None:
    folder = packed_export(pruned_model(architecture, pattern, dtype), tmp_path, pattern)
    model = from_pretrained(dtype="auto", what="saved", pretrained_model_name_or_path=str(tmp_path / "saved"))
    assert model.dtype == dtype
    loaded, report = load_packed(folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert report.packed
    assert bool(report.unpacked) == experts, str(report)
    assert all("has no packed forward" in why for why in report.unpacked.values())
    assert report.resident_bytes < report.dense_bytes
    dense, all_dense = load_packed(folder, dense=True)
    assert torch.equal(logits_of(dense), logits_of(model))
    assert all_dense.resident_bytes == all_dense.dense_bytes
    assert set(all_dense.unpacked) == set(report.packed) | set(report.unpacked)
    state = model.state_dict()
    assert dense.state_dict().keys() == state.keys()
    for name, kind, array in reference_reader.read_weights(folder):
        wanted = state[name].float().numpy()
        assert (reference_reader.as_float32(array, kind) == wanted).all(), name
        assert torch.equal(dense.state_dict()[name], state[name]), name


def test_a_packed_model_generates_and_refuses_to_be_saved_as_a_plain_one(llama: Path, tmp_path: Path) -> None:
    model: Any = load_sparse(llama)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.model.modules())
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = load_sparse(llama, dense=True)
    assert torch.equal(model.generate(tokens(1), **options), plain.generate(tokens(1), **options))  # type: ignore[operator]
    assert torch.equal(logits_of(model.double()), logits_of(plain.double()))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="load it with dense=True"):
        model.save_pretrained(tmp_path / "never")


class Numbers:
    """A tokenizer whose text is token ids."""

    eos_token_id = None

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[int(word) for word in text.split()]], dtype=torch.long)
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_generation_is_greedy_or_decided_by_its_seed(llama: Path) -> None:
    model: Any = load_sparse(llama)
    model.generation_config.eos_token_id = None
    found = generate(model, Numbers(), "5 6 7", tokens=6)
    prompt = torch.tensor([[5, 6, 7]])
    for token in found.tokens:  # without a cache, from the start each time
        assert int(logits_of_ids(model, prompt)[0, -1].argmax()) == token
        prompt = torch.cat([prompt, torch.tensor([[token]])], dim=1)
    assert found.text == " ".join(map(str, found.tokens))
    one, same, other = (
        generate(model, Numbers(), "5 6 7", tokens=12, temperature=1.5, seed=s).tokens for s in (1, 1, 2)
    )
    assert one == same != other
    model.generation_config.eos_token_id = found.tokens[0]
    assert generate(model, Numbers(), "5 6 7", tokens=6).tokens == []


@torch.no_grad()
def logits_of_ids(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("prompt", "tokens_wanted", "temperature", "sentence"),
    [
        ("5", 0, 0.0, "at least 1"),
        ("5", 4, -1.0, "a positive number"),
        ("5", 4, float("nan"), "a positive number"),
        ("", 4, 0.0, "holds no token"),
        ("5", 64, 0.0, "exceed the model's 64"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    llama: Path, prompt: str, tokens_wanted: int, temperature: float, sentence: str
) -> None:
    with pytest.raises(ExportError, match=sentence):
        generate(load_sparse(llama), Numbers(), prompt, tokens=tokens_wanted, temperature=temperature)


def test_a_model_that_overflows_says_so_instead_of_a_token(llama: Path) -> None:
    model: Any = load_sparse(llama)
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ExportError, match="a logit is not finite"):
        generate(model, Numbers(), "5 6", tokens=2)


def test_modes_that_cannot_be_are_refused_before_anything_is_read(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"mode='throughput': holds forms .* on cpu load with dense=True"):
        load_sparse(llama, mode="throughput")
    for place in ("cpu", "cuda"):
        with pytest.raises(ExportError, match=r"unknown mode 'troughput'.*Did you mean 'throughput'"):
            load_sparse(tmp_path / "gone", mode="troughput", device=place)  # type: ignore[arg-type]


def test_what_a_model_holds_is_counted_by_memory(llama: Path) -> None:
    model, report = load_packed(llama)
    assert resident_bytes([model]) == report.resident_bytes
    assert resident_bytes([model, model.model.layers[0]]) == report.resident_bytes  # type: ignore[attr-defined]
    assert "mode" not in str(report)
    report.mode = "throughput"
    assert ", mode throughput" in str(report)


def test_what_large_batches_need_is_known_before_loading() -> None:
    extra = functools.partial(extra_bytes, dtype=torch.bfloat16, device=None)
    for out, inputs in ((4096, 4096), (12288, 4096)):
        for mode in ("decode", "throughput"):
            assert extra((out, inputs), mode=mode) == 0, "as measured, no other form is worth its memory"
    assert extra((48, 640), mode="decode") == 0
    assert extra((48, 640), mode="throughput") == 48 * 640 * 2 * 1.5625, "of what nobody measured both forms are held"


def _manifest(folder: Path, change: Any) -> None:
    """Edit the manifest and make its hash fit, as another writer might."""
    body = json.loads((folder / MANIFEST).read_text())
    change(body)
    (folder / MANIFEST).write_text(json.dumps(body))
    write_sums(folder)


def _flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


SITE = "model.layers.0.mlp.up_proj.weight"

DAMAGES: list[tuple[str, Any, str]] = [
    ("weights-flipped", lambda f: _flip(f / WEIGHTS, -1), "truncated or altered"),
    ("values-flipped", lambda f: _flip(f / WEIGHTS, 20_000), "truncated or altered"),
    ("weights-cut", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "truncated"),
    ("header-cut", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]), "truncated"),
    ("no-weights", lambda f: (f / WEIGHTS).unlink(), "is missing"),
    ("config-altered", lambda f: _flip(f / "config.json", 30), r"config\.json is truncated or altered"),
    ("manifest-cut", lambda f: (f / MANIFEST).write_text("{"), r"manifest\.json is truncated or altered"),
    ("no-sums", lambda f: (f / SUMS).unlink(), "no complete export"),
    ("sums-cut", lambda f: (f / SUMS).write_text((f / SUMS).read_text()[:70]), "is truncated|is missing"),
    ("stranger", lambda f: (f / "model.safetensors").write_bytes(b""), "is not of this export"),
    ("version", lambda f: _manifest(f, lambda b: b.update(version=2)), "version 2; this code reads"),
    ("format", lambda f: _manifest(f, lambda b: b.update(format="other")), "format 'other'"),
    ("dtype", lambda f: _manifest(f, lambda b: b["tensors"][SITE].update(dtype="F8_E4M3")), "unknown type 'F8_E4M3'"),
    ("layout", lambda f: _manifest(f, lambda b: b["tensors"][SITE].update(layout="blocks")), "unknown layout"),
    ("group", lambda f: _manifest(f, lambda b: b["tensors"][SITE].update(group=5)), "cannot be packed 2:5"),
    ("one-less", lambda f: _manifest(f, lambda b: b["tensors"].pop(SITE)), "the manifest disagree"),
    ("no-about", lambda f: _manifest(f, lambda b: b.pop("about")), "a field is missing or wrong"),
    ("other-model", lambda f: _config(f, hidden_size=64), "does not fit its configuration"),
    (
        "branch-of-nothing",
        lambda f: _branch(f, {"gone.slorb_B": torch.zeros(4, 2)}),
        "gone belongs to no packed weight",
    ),
    ("branch-of-dense", lambda f: _branch(f, {"model.norm.weight.slorb_B": torch.zeros(4, 2)}), "no packed weight"),
    ("branch-too-short", lambda f: _branch(f, {f"{SITE}.slorb_B": torch.zeros(63, 2)}), "has another shape"),
    ("branch-of-thirds", lambda f: _branch(f, {f"{SITE}.slorb_B": torch.zeros(64, 3)}), "has another shape"),
    (
        "projection-too-short",
        lambda f: _branch(f, {f"{SITE}.slorb_B": torch.zeros(64, 2), f"{SITE}.slorb_P": torch.zeros(2, 31)}),
        "has another shape",
    ),
    ("unknown-model", lambda f: _config(f, model_type="gone"), "makes no model"),
]


def _branch(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / BRANCHES)
    write_sums(folder)


def _config(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, **changes}))
    write_sums(folder)


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_export_is_refused_before_any_token(copy: Path, damage: Any, sentence: str) -> None:
    damage(copy)
    with pytest.raises((ExportError, UnsupportedModel), match=sentence):
        load_sparse(copy)


def test_the_reference_reader_needs_numpy_alone_and_finds_damage(copy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparseforge_core.runtime.reference_reader import read_weights; "
        f"print(sum(1 for _ in read_weights(Path({str(copy)!r})))); "
        "print(*(m for m in ('torch', 'transformers', 'safetensors', 'ml_dtypes') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    tensors, loaded = done.stdout.split("\n")[:2]
    assert int(tensors) == len(json.loads((copy / MANIFEST).read_text())["tensors"])
    assert loaded == ""
    source = Path(reference_reader.__file__ or "")
    assert len(source.read_text().splitlines()) <= 150
    _flip(copy / WEIGHTS, 20_000)
    with pytest.raises(SparseForgeError, match="truncated or altered"):
        list(reference_reader.read_weights(copy))


def test_semi_structured_tensors_need_a_gpu_and_say_so(llama: Path) -> None:
    if torch.cuda.is_available():
        with pytest.raises(ExportError, match=r"its type is F32; export with --dtype"):
            load_semi_structured(llama)
    else:
        with pytest.raises(ExportError, match="need a CUDA device"):
            load_semi_structured(llama)


@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "why"),
    [
        ("BF16", (64, 128), Layout(2, 4, transposed=False), None),
        ("F16", (32, 64), Layout(2, 4, transposed=False), None),
        ("F32", (64, 128), Layout(2, 4, transposed=False), "its type is F32"),
        ("BF16", (64, 128), Layout(4, 8, transposed=False), "its pattern is 4:8"),
        ("BF16", (64, 128), None, "its pattern is dense"),
        ("BF16", (64, 128), Layout(2, 4, transposed=True), "not stored as an"),
        ("BF16", (3, 64, 128), Layout(2, 4, transposed=False), "not stored as an"),
        ("BF16", (48, 128), Layout(2, 4, transposed=False), "no multiples of 32 x 64"),
    ],
)
def test_which_weights_torch_can_take(
    dtype: str, shape: tuple[int, ...], layout: Layout | None, why: str | None
) -> None:
    said = refusal(Entry("w", dtype, shape, "", layout))
    assert said is None if why is None else why in str(said)

"""`doctor --model`: figures with their source, reasons where 2:4 will not help, sentences for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows import outlook
from sparseforge_core.runtime import prediction, prompt_prediction
from tests.core.runtime.test_prediction import measured, prompts
from tests.flows.test_cli import run
from tests.tiny import tiny_model


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results file of a machine that follows the law, in the place of the committed one."""
    rows = [
        {"measure": name, "value": value, "hardware": "a GPU"} for name, value in measured(3e-6, 0.9, 4e-6, 0.1).items()
    ]
    path = tmp_path / "decode.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(outlook, "RESULTS", path)
    return path


def test_a_known_model(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--model", "llama-2-7b") == 0
    text = capsys.readouterr().out
    assert "predicted from a GPU" in text
    assert "7.27 GiB with 2:4, 12.55 dense" in text
    assert "cache; 7.27 with 2:4 in mode throughput" in text, "nothing else is worth its memory"
    assert run("doctor", "--model", "llama-3-8b") == 0
    assert "cache; at most " in capsys.readouterr().out, "nobody measured large batches of its shapes"
    assert run("doctor", "--model", "llama-2-7b", "--batch", "8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 8
    assert found["gain"] == pytest.approx(found["sparse_tokens_per_second"] / found["dense_tokens_per_second"])
    assert 1.3 < found["gain"] < 1.78


def test_prompts_are_told_by_mode(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--model", "llama-2-7b") == 0
    assert "2,048 tokens: not predicted; measured: none" in capsys.readouterr().out
    rows = json.loads(results.read_text())
    timed = prompts(2e-15, 1.0)
    unpacked = {
        name.replace("prefill_ms", "prompt_ms"): value * (2.0 if "sparse" in name else 1.0)
        for name, value in timed.items()
        if "over" not in name
    }
    rows += [{"measure": name, "value": value} for name, value in (timed | unpacked).items()]
    results.write_text(json.dumps(rows))
    assert run("doctor", "--model", "llama-2-7b") == 0
    text = capsys.readouterr().out
    assert "2,048 tokens in mode throughput: 41.4 ms with 2:4, 55.3 dense: 1.33 times" in text
    assert "2,048 tokens in mode decode: 82.9 ms with 2:4, 55.3 dense: 0.67 times" in text
    assert "takes 1.50 times as long as with dense weights in mode decode; mode throughput" in text
    assert run("doctor", "--model", "llama-2-7b", "--prompt", "512") == 0
    assert "512 tokens: not predicted; measured: 1,024 to 4,096 tokens in mode throughput" in capsys.readouterr().out


def test_figures_of_the_same_gpu_are_preferred(results: Path) -> None:
    """A GPU with results of its own is predicted from them, another from those of RESULTS."""
    mine = [{"measure": "copy_bandwidth", "value": 4.2, "hardware": "Some GPU X2, torch 2"}]
    (results.parent / "decode-x2.json").write_text(json.dumps(mine))
    assert outlook.committed("Some GPU X2") == ({"copy_bandwidth": 4.2}, "Some GPU X2, torch 2")
    assert outlook.committed("Some GPU X")[1] == "a GPU"
    assert outlook.committed(None)[1] == "a GPU"


def test_batches_that_a_gpu_did_not_measure_grow_as_in_the_full_results(results: Path) -> None:
    """A file of batches 1 and 16 does not make a step of 64 rows four times one of 16."""
    mine = [
        {"measure": name, "value": 2.0 * value, "hardware": "Some GPU X2, torch 2"}
        for name, value in measured(3e-6, 0.9, 4e-6, 0.1).items()
        if not name.startswith("step_ms") or name.endswith(("batch_1", "batch_16"))
    ]
    (results.parent / "decode-x2.json").write_text(json.dumps(mine))
    found, source = outlook.committed("Some GPU X2")
    whole, _ = outlook.committed(None)
    assert source == "Some GPU X2, torch 2; batches of 2, 4, 8, 32, 64 by how steps grow on a GPU"
    assert found == pytest.approx({name: 2.0 * value for name, value in whole.items()})


def test_an_h200_is_predicted_from_its_own_measurements() -> None:
    """The committed files: what was measured on an H200 is repeated within the tenth that the bar allows."""
    found, source = outlook.committed("NVIDIA H200")
    assert source.startswith("NVIDIA H200, ")
    bandwidth = 1e12 * found["copy_bandwidth"]
    sizes = prediction.KNOWN[prediction.MEASURED]
    expected = prediction.forecast(sizes, found, measured_at=prediction.CONTEXT, bandwidth=bandwidth)
    whole, _ = outlook.committed("NVIDIA H100 80GB HBM3")
    for results, within in ((found, 0.05), (whole, 0.1)):
        for prompt, output in ((128, 128), (128, 1024), (1024, 128), (1024, 1024)):
            given = {"measured_at": prediction.CONTEXT, "bandwidth": bandwidth, "context": prompt + output // 2}
            behind = prediction.forecast(sizes, results, **given)
            name = f"decode_tokens_per_second.{prompt}_{output}"
            assert behind.sparse_tokens_per_second == pytest.approx(found[name], rel=within)
            assert behind.dense_tokens_per_second == pytest.approx(found[f"dense_{name}"], rel=within)
    crowd = prediction.forecast(sizes, found, measured_at=prediction.CONTEXT, bandwidth=bandwidth, batch=64)
    assert 0.95 < crowd.gain < expected.gain
    for length in (4096, 8192):  # prompts are limited by tensor cores that both GPUs have
        filled = prompt_prediction.forecast_prompt(sizes, whole, length, "throughput")
        assert filled is not None
        assert 1e3 * filled.sparse_seconds == pytest.approx(found[f"prefill_ms.sparse.{length}"], rel=0.1)
        assert 1e3 * filled.dense_seconds == pytest.approx(found[f"prefill_ms.dense.{length}"], rel=0.1)
    assert outlook.committed("NVIDIA H100 80GB HBM3")[1].startswith("NVIDIA H100 80GB HBM3, ")


def test_a_model_that_gains_nothing_is_told_so(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    assert run("doctor", "--model", tmp_path / "tiny") == 0
    assert "2:4 will not help at batch 1: 1.0" in capsys.readouterr().out


def test_a_model_whose_cache_is_not_ours_is_told_so(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 16
    model.save_pretrained(tmp_path / "windowed")
    assert run("doctor", "--model", tmp_path / "windowed", "--context", "10") == 0
    assert "sliding window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "llama-2-7"], "Did you mean 'llama-2-7b'"),
        (["--model", "llama-2-7b", "--batch", "0"], "batch 0, context 192: at least 1"),
        (["--model", "llama-2-7b", "--context", "4096"], "within the model's 4096"),
        (
            ["--model", "llama-2-7b", "--prompt", "4097"],
            "a prompt of 4097 tokens: at least 1, and within the model's 4096",
        ),
    ],
)
def test_bad_requests_get_a_sentence(
    results: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("doctor", *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_other_architectures_are_refused(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert run("doctor", "--model", tmp_path / "gpt2") == 2
    assert "speed is predicted for LLaMA-like models" in capsys.readouterr().err
    outlook.RESULTS.unlink()
    assert run("doctor", "--model", "llama-2-7b") == 2
    assert "run benchmarks/decode.py on a GPU" in capsys.readouterr().err

"""A model split into body and head has the logits of the whole, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sparseforge_core.errors import UnsupportedModel
from sparseforge_core.models.heads import split
from tests.tiny import EVERY_ARCHITECTURE, tiny_model, tokens

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
UNUSUAL = {
    "soft cap": ("Gemma2Config", {"head_dim": 16, "final_logit_softcapping": 0.3}),
    "scale": ("CohereConfig", {"logit_scale": 0.25}),
    "divisor": ("GraniteConfig", {"logits_scaling": 4.0}),
    "bias": ("PhiConfig", {}),
    "experts": ("MixtralConfig", {"num_local_experts": 4}),
    "untied": ("LlamaConfig", {"tie_word_embeddings": False}),
}


ODD = ("deepseek-original",)
"""Their forward takes token ids alone, so that nothing can be handed to the head."""


def unusual(name: str, **changes: Any) -> Any:
    """A random model with the head that the name says."""
    kind, values = UNUSUAL[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **values, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()  # a fresh bias is 0, and logits must be large enough for a cap to show
    return model


@pytest.mark.parametrize("name", [*(name for name in EVERY_ARCHITECTURE if name not in ODD), *UNUSUAL])
def test_body_and_head_make_the_model(name: str) -> None:
    model = unusual(name) if name in UNUSUAL else tiny_model(name)
    parts = split(model)
    whole = model(input_ids=tokens(), use_cache=False).logits
    hidden = parts.body(input_ids=tokens(), use_cache=False).last_hidden_state
    assert parts.vocabulary == whole.shape[-1]
    together = torch.stack([parts.head(row) for row in hidden])
    torch.testing.assert_close(together, whole, rtol=1e-6, atol=1e-6)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = torch.autograd.grad(whole.square().sum(), list(trained.values()))
    found = torch.autograd.grad(together.square().sum(), list(trained.values()))
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for parameter, ours, theirs in zip(trained, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * scale, msg=parameter)


def test_the_head_follows_the_model_it_came_from() -> None:
    model = tiny_model("llama")
    parts = split(model)
    hidden = torch.randn(3, 64)
    before = parts.head(hidden)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    torch.testing.assert_close(parts.head(hidden), 2.0 * before)
    assert parts.body is model.model


@pytest.mark.parametrize("name", ODD)
def test_a_forward_that_takes_token_ids_alone_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="its head cannot be applied"):
        split(tiny_model(name))


def test_a_head_that_needs_more_than_hidden_states_is_refused() -> None:
    config = transformers.FalconH1Config(**SIZES, mamba_n_heads=2, mamba_d_head=32, mamba_d_ssm=64, mamba_d_state=8)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModel, match="FalconH1ForCausalLM: its head cannot be applied"):
        split(model)


def test_a_model_whose_parts_do_not_make_it_is_refused() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        """Its logits depend on the token ids too, which no head sees."""

        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits * (1.0 if input_ids is None else 2.0)
            return output

    model = Doubled(transformers.LlamaConfig(**SIZES)).eval()
    with pytest.raises(UnsupportedModel, match="gives other logits"):
        split(model)

"""Placements: where a cell runs and what it costs. Never part of a cell's identity."""

from __future__ import annotations

from dataclasses import dataclass

from flows.devices import MICRO_BATCH
from sparseforge_core.errors import RecipeError
from sparseforge_core.models.sources import Hub, Local, ModelSource, Packaged, Tiny, TrainedBPE
from sparseforge_core.recipe import Recipe, Trained


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What planning needs to know of a model without loading it."""

    name: str
    parameters: float
    context: int
    active: float | None = None
    """Parameters that one token passes through, where experts are chosen; None: all of them."""


ACTIVE = {"deepseek-ai/deepseek-moe-16b-base": 2828.0e6}
"""Mixtures of experts: 6 of 64 routed experts and 2 shared ones a layer work on a token."""

CARDS = {
    card_id: ModelCard(name=name, parameters=parameters, context=context, active=ACTIVE.get(card_id))
    for card_id, name, parameters, context in (
        ("openai-community/gpt2", "GPT-2", 124.4e6, 1024),
        ("openai-community/gpt2-medium", "GPT-2-Medium", 354.8e6, 1024),
        ("openai-community/gpt2-large", "GPT-2-Large", 774.0e6, 1024),
        ("openai-community/gpt2-xl", "GPT-2-XL", 1557.6e6, 1024),
        ("facebook/opt-125m", "OPT-125M", 125.2e6, 2048),
        ("facebook/opt-350m", "OPT-350M", 331.2e6, 2048),
        ("facebook/opt-1.3b", "OPT-1.3B", 1315.8e6, 2048),
        ("facebook/opt-2.7b", "OPT-2.7B", 2651.6e6, 2048),
        ("meta-llama/Llama-2-7b-hf", "LLaMA-2-7B", 6738.4e6, 4096),
        ("meta-llama/Llama-2-13b-hf", "LLaMA-2-13B", 13015.9e6, 4096),
        ("Qwen/Qwen3-1.7B", "Qwen3-1.7B", 1720.6e6, 40960),
        ("Qwen/Qwen3-8B", "Qwen3-8B", 8190.7e6, 40960),
        ("Qwen/Qwen3-14B", "Qwen3-14B", 14768.3e6, 40960),
        ("deepseek-ai/deepseek-moe-16b-base", "DeepSeek-MoE-16B", 16375.7e6, 4096),
        ("smollm2-135m", "SmolLM2-135M", 134.5e6, 8192),
    )
}
"""Parameter counts from the models' own checkpoints."""

GPU_FLOPS = 400e12 * 0.5
"""Assumed useful rate of one data-centre GPU in bf16: half of 400 TFLOP/s."""
CPU_FLOPS = 50e9
"""Assumed useful rate of one CPU core in float32."""
GPU_GIB = 80.0
FOLDERS_VOCABULARY = 50_257
"""Entries assumed of a tokenizer that is only known as a folder: GPT-2's."""
EVALUATION_TOKENS = 1.5e6
"""Tokens that a set of zero-shot and perplexity suites puts through the model."""
CPU_MINUTES = 30.0
"""A cell that one core finishes within these runs on the CPU pool: what takes longer is worth a GPU's minute."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices and how a batch is cut over them."""

    pool: str
    gpus: int
    micro_batch: int | None = None


def card_of(source: ModelSource) -> ModelCard:
    """Size and name of a model source. Raises RecipeError for a hub model that has no card."""
    if isinstance(source, Trained):
        return card_of(source.recipe.model)
    if isinstance(source, Tiny):
        return _tiny_card(source)
    if isinstance(source, (Hub, Packaged)):
        name = source.id if isinstance(source, Hub) else source.name
        if name in CARDS:
            return CARDS[name]
        raise RecipeError(f"model {name!r} has no card; add its size to CARDS in flows/placements.py")
    if isinstance(source, Local):
        return ModelCard(name=source.path.rstrip("/").rpartition("/")[2], parameters=1e9, context=2048)
    raise RecipeError(f"no size is known for a {type(source).__name__}")


def _tiny_card(source: Tiny) -> ModelCard:
    """Four square matrices of attention and two of the MLP a block, and the embedding, as most of these models have."""
    vocabulary = source.tokenizer.size if isinstance(source.tokenizer, TrainedBPE) else FOLDERS_VOCABULARY
    block = 4 * source.width**2 + 2 * source.width * (source.mlp or 3 * source.width)
    parameters = source.layers * block + vocabulary * source.width
    size = "tiny" if parameters < 1e7 else f"{parameters / 1e6:.0f}M"
    return ModelCard(name=f"{source.architecture}-{size}", parameters=parameters, context=source.positions)


def model_name(source: ModelSource) -> str:
    """What people call the model."""
    return card_of(source).name


def memory_gib(recipe: Recipe) -> float:
    """Weights, gradients, moments, mean, mask, view, curvature in float32, the teacher; GiB, without activations."""
    parameters = card_of(recipe.model).parameters
    if not recipe.train.steps:
        return 4.0 * parameters / 2**30
    per_weight = (20.0 if recipe.train.averages else 16.0) + (13.0 if recipe.method.sparsifies else 0.0)
    teacher = teacher_card(recipe)
    return (per_weight * parameters + (recipe.objective.teacher_bytes * teacher.parameters if teacher else 0.0)) / 2**30


def teacher_card(recipe: Recipe) -> ModelCard | None:
    """The teacher's card: the recipe's own dense model unless the objective names one; None without distillation."""
    if not recipe.objective.distills:
        return None
    named: ModelSource | None = getattr(recipe.objective, "teacher", None)
    return card_of(named or recipe.model)


def flops(recipe: Recipe) -> float:
    """Training at 6 N a token, 2 N of a teacher, 4 N more where it takes steps and 2 N where it is held in them, N of
    mask work where there are masks; then the evaluation."""
    card, teacher = card_of(recipe.model), teacher_card(recipe)
    working = card.active or card.parameters
    per_token = (7.0 if recipe.method.sparsifies else 6.0) * working
    if teacher:
        correction = recipe.objective.correcting
        passes = 2.0
        if correction is not None:
            passes += (6.0 if correction.anchor else 4.0) / correction.every
        per_token += passes * (teacher.active or teacher.parameters)
    evaluated = 1e5 if card.parameters < 1e7 else EVALUATION_TOKENS
    return per_token * recipe.train.tokens + 2.0 * working * evaluated


def placement_for(recipe: Recipe) -> Placement:
    """The smallest pool of GPUs that holds the recipe; what one core does in minutes runs anywhere.

    Without a GPU, `--pool gpu-1` runs here what is placed there, at a core's pace.
    """
    if card_of(recipe.model).parameters < 2e8 and flops(recipe) < CPU_FLOPS * 60.0 * CPU_MINUTES:
        return Placement(pool="cpu", gpus=0)
    if memory_gib(recipe) < 0.7 * GPU_GIB:
        return Placement(pool="gpu-1", gpus=1, micro_batch=MICRO_BATCH["gpu-1"])
    return Placement(pool="gpu-8", gpus=8, micro_batch=MICRO_BATCH["gpu-8"])


def cost_hours(recipe: Recipe) -> float:
    """Device hours at the assumed rates above."""
    rate = CPU_FLOPS if placement_for(recipe).pool == "cpu" else GPU_FLOPS
    return flops(recipe) / rate / 3600.0

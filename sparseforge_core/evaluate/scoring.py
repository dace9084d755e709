"""Log-likelihoods of continuations, fast: the choices of one item share one run of their common context.

Requests of one group (the choices of an item) are laid out as a *tree*: their common prefix once, then each rest as a
branch that sees the prefix and itself, at the positions it would have alone. Trees are sorted by length and put end to
end into the rows of a batch, each seeing itself only, so that little is padding; a batch never holds more tokens than
`batch_size` sequences of the longest request. The vocabulary is multiplied only where a token is scored. What a token
sees is exactly what it sees when each request is run by itself.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseforge_core.errors import DataError

VOCABULARY_ROWS = 512
"""Scored tokens normalised at a time: bounds the memory of the softmax."""

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would produce it."""


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, both as token ids; requests of one group share their context."""

    context: list[int]
    continuation: list[int]
    group: Hashable


@dataclass(frozen=True)
class _Branch:
    """One distinct input of a tree: what is run after the prefix, and the requests that read it."""

    rest: list[int]
    readers: list[int]


@dataclass(frozen=True)
class _Tree:
    prefix: list[int]
    branches: list[_Branch]

    @property
    def length(self) -> int:
        return len(self.prefix) + sum(len(branch.rest) for branch in self.branches)


Row = list[_Tree]
"""Trees that are run end to end in one row of a batch."""


class Scorer:
    """Scores requests on one model."""

    def __init__(self, model: Any, *, batch_size: int, max_length: int, shared: bool = True) -> None:
        """`shared` False runs every request in a row of its own, as stock lm-eval does."""
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.packed = shared and packs(model, max_length)
        self.truncated = 0
        """Requests so far that were longer than the model and lost tokens on the left."""

    def score(self, requests: Sequence[Request]) -> Iterator[dict[int, Answer]]:
        """Answers by index into `requests`, a batch at a time, longest first.

        A sequence longer than the model loses tokens on the left, as in stock lm-eval: its last `max_length` inputs
        are run. Raises DataError for a continuation that is empty or longer than the model.
        """
        inputs = [self._input(request) for request in requests]
        budget = self.batch_size * max((len(tokens) for tokens in inputs), default=0)
        trees = [part for tree in self._trees(requests, inputs) for part in _split(tree, budget)]
        for batch in _batches(trees, budget, joined=self.packed):
            yield self._run(batch, [len(tokens) for tokens in inputs], requests)

    def _input(self, request: Request) -> list[int]:
        """What the model is run on: all but the last token, cut on the left to the model's length."""
        if not request.context or not request.continuation:
            raise DataError("a request to score needs at least one token of context and one of continuation")
        if len(request.continuation) > self.max_length:
            raise DataError(
                f"a continuation has {len(request.continuation)} tokens and the model accepts at most "
                f"{self.max_length}; an answer cannot be cut, so this model cannot be measured on this task"
            )
        tokens = request.context + request.continuation
        self.truncated += len(tokens) > self.max_length + 1
        return tokens[-(self.max_length + 1) :][:-1]

    def _trees(self, requests: Sequence[Request], inputs: list[list[int]]) -> list[_Tree]:
        groups: dict[Hashable, dict[tuple[int, ...], list[int]]] = {}
        for index, (request, tokens) in enumerate(zip(requests, inputs, strict=True)):
            # Equal inputs are run once: one-token answers such as yes and no are read off the same position.
            group = request.group if self.packed else ("alone", tuple(tokens), request.group)
            groups.setdefault(group, {}).setdefault(tuple(tokens), []).append(index)
        trees = []
        for distinct in groups.values():
            shared = _common(list(distinct))
            branches = [_Branch(list(tokens[shared:]), readers) for tokens, readers in distinct.items()]
            trees.append(_Tree(list(next(iter(distinct))[:shared]), branches))
        return trees

    @torch.no_grad()
    def _run(self, rows: list[Row], lengths: list[int], requests: Sequence[Request]) -> dict[int, Answer]:
        layout = _Layout(rows)
        at: list[int] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, tree in layout.starts:
            shared, rest_at = len(tree.prefix), start + len(tree.prefix)
            for branch in tree.branches:
                for reader in branch.readers:
                    wanted = requests[reader].continuation
                    places = range(lengths[reader] - len(wanted), lengths[reader])
                    at += [start + p if p < shared else rest_at + p - shared for p in places]
                    targets += wanted
                    spans.append((reader, len(wanted)))
                rest_at += len(branch.rest)
        device = next(self.model.parameters()).device
        logits = _logits_at(
            self.model, layout.ids.to(device), torch.tensor(at, device=device), layout.where(device, self.model.dtype)
        )
        return _answers(logits, torch.tensor(targets, device=device), spans)


class _Layout:
    """Rows of trees as tensors `[rows, width]`: token ids, positions, and what each token belongs to."""

    def __init__(self, rows: list[Row]) -> None:
        width = max(sum(tree.length for tree in row) for row in rows)
        self.ids = torch.zeros(len(rows), width, dtype=torch.long)
        self.positions = torch.zeros(len(rows), width, dtype=torch.long)
        self.tree = torch.full((len(rows), width), -1)
        self.branch = torch.zeros(len(rows), width, dtype=torch.long)
        self.starts: list[tuple[int, _Tree]] = []
        """Where each tree begins in the flattened rows."""
        self.alone = all(len(row) == 1 and len(row[0].branches) == 1 for row in rows)
        for number, row in enumerate(rows):
            end = 0
            for label, tree in enumerate(row):
                self.starts.append((number * width + end, tree))
                end = self._put(number, end, label, tree)
            self.ids[number, end:] = self.ids[number, end - 1]  # padding is never looked at

    def _put(self, row: int, start: int, label: int, tree: _Tree) -> int:
        parts = [tree.prefix, *(branch.rest for branch in tree.branches)]
        for number, tokens in enumerate(parts):
            end, first = start + len(tokens), len(tree.prefix) if number else 0
            self.ids[row, start:end] = torch.tensor(tokens, dtype=torch.long)
            self.positions[row, start:end] = torch.arange(first, first + len(tokens))
            self.tree[row, start:end] = label
            self.branch[row, start:end] = number
            start = end
        return start

    def where(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Positions and the additive mask `[rows, 1, width, width]`: the past of the own tree's prefix and branch.

        None where each row is one plain sequence: then the model's own causal mask says the same, faster.
        """
        if self.alone:
            return {"attention_mask": None, "position_ids": None}
        tree, branch = self.tree.to(device), self.branch.to(device)
        width = tree.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool, device=device).tril()[None]
        seen = seen & (tree[:, :, None] == tree[:, None, :])
        seen &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        return {"attention_mask": mask[:, None], "position_ids": self.positions.to(device)}


def packs(model: Any, max_length: int) -> bool:
    """Whether trees are exact for this model on inputs of `max_length`: every token may see its whole past, positions
    are given and not counted off the row, and the attention takes a mask.
    """
    config = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    allowed = {"full_attention"} if window is None or window < max_length else {"full_attention", "sliding_attention"}
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    return (
        getattr(config, "_attn_implementation", "") in ("sdpa", "eager")
        and (window is None or window >= max_length)
        and kinds <= allowed
        and not getattr(config, "alibi", False)
        and {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters)
    )


def _common(sequences: list[tuple[int, ...]]) -> int:
    """Length of the longest common prefix."""
    shortest, longest = min(sequences), max(sequences)
    for place, (a, b) in enumerate(zip(shortest, longest)):  # the lexicographic extremes differ first
        if a != b:
            return place
    return min(len(shortest), len(longest))


def _split(tree: _Tree, budget: int) -> list[_Tree]:
    """The tree, or several with the same prefix where its branches together exceed a batch."""
    parts: list[list[_Branch]] = [[]]
    size = len(tree.prefix)
    for branch in tree.branches:
        if parts[-1] and size + len(branch.rest) > budget:
            parts.append([])
            size = len(tree.prefix)
        parts[-1].append(branch)
        size += len(branch.rest)
    return [_Tree(tree.prefix, branches) for branches in parts]


def _batches(trees: list[_Tree], budget: int, *, joined: bool) -> Iterator[list[Row]]:
    """Batches of at most `budget` tokens with the padding, longest first.

    Each row takes the longest tree that is left; what room it has beside the batch's widest is filled with the longest
    that fit, if trees may be `joined`.
    """
    left = sorted(trees, key=lambda tree: tree.length)
    lengths = [tree.length for tree in left]

    def take(room: int) -> _Tree | None:
        place = bisect.bisect_right(lengths, room) - 1
        if place < 0:
            return None
        lengths.pop(place)
        return left.pop(place)

    while left:
        width = lengths[-1]
        batch: list[Row] = []
        while left and (len(batch) + 1) * width <= budget:
            row: Row = []
            room = width
            while (tree := take(room)) is not None:
                row.append(tree)
                room -= tree.length
                if not joined:
                    break
            batch.append(row)
        yield batch


def _logits_at(model: Any, ids: Tensor, at: Tensor, where: dict[str, Any]) -> Tensor:
    """Logits `[len(at), vocabulary]` at flat positions of `ids`; the other positions never meet the vocabulary."""

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[at][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False, **where).logits[0]
    finally:
        hook.remove()
    return logits


def _answers(logits: Tensor, targets: Tensor, spans: list[tuple[int, int]]) -> dict[int, Answer]:
    values, hits = [], []
    for part, wanted in zip(logits.split(VOCABULARY_ROWS), targets.split(VOCABULARY_ROWS), strict=True):
        scores = part.float()
        values.append(scores.gather(1, wanted[:, None])[:, 0] - scores.logsumexp(1))
        hits.append(scores.argmax(1) == wanted)
    likelihoods, greedy = torch.cat(values).double().cpu(), torch.cat(hits).cpu()
    sizes = [size for _, size in spans]
    return {
        reader: (float(part.sum()), bool(hit.all()))
        for (reader, _), part, hit in zip(spans, likelihoods.split(sizes), greedy.split(sizes), strict=True)
    }

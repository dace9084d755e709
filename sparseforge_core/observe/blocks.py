"""Calibration text carried through a model block by block: the memory of one block plus the hidden states.

The model itself says how its blocks are called. One pass over the calibration text runs the first block for real and
lets every other block answer with the first one's output, while the arguments of each call are kept. Where the hidden
state goes in and comes out is then found by identity, so no calling convention of a library is repeated here.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_core.errors import CurvatureUnavailable, UnsupportedModel
from sparseforge_core.models.sites import Site
from sparseforge_core.observe.activations import NormSums, See, watching


class _Reached(Exception):
    """The last block was called; the rest of the model need not run."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, its hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    """Where the hidden state belongs: a position in `args` or a name in `kwargs`."""

    def of(self, block: nn.Module, hidden: Tensor) -> Any:
        """Call the block with another hidden state."""
        device = hidden.device
        args = [_moved(x, device) for x in self.args]
        kwargs = {name: _moved(x, device) for name, x in self.kwargs.items()}
        if isinstance(self.place, int):
            args[self.place] = hidden
        else:
            kwargs[self.place] = hidden
        return block(*args, **kwargs)


class Block:
    """One block with its sites, and the hidden states that reach it."""

    def __init__(self, module: nn.Module, sites: list[Site], stream: _Stream, index: int) -> None:
        self.module, self.sites = module, sites
        self._stream, self._index = stream, index

    @property
    def device(self) -> torch.device:
        """Where this block computes."""
        return self._stream.device

    def inputs(self) -> list[Tensor]:
        """The hidden states that reach the block, one tensor a batch."""
        return self._stream.hidden

    def call(self, batch: int, hidden: Tensor) -> Tensor:
        """The block's output for a hidden state in place of that of a batch; gradients flow if they are enabled."""
        return self._stream.output(self._stream.calls[self._index][batch].of(self.module, hidden))

    @torch.no_grad()
    def observe(self, see: See, sites: list[Site] | None = None, batches: int | None = None) -> None:
        """Run the block, on the first `batches` or on all, and tell `see` of the inputs of its sites, or of some."""
        with watching(self.sites if sites is None else sites, see):
            for batch, hidden in enumerate(self._stream.hidden[:batches]):
                self.call(batch, hidden)

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by the block's outputs."""
        for batch, hidden in enumerate(self._stream.hidden):
            self._stream.hidden[batch] = self.call(batch, hidden)

    def input_norms(self) -> dict[str, Tensor]:
        """l2 norm of each input of each site; see `activations.input_norms`."""
        sums = NormSums(self.sites, self.device)
        self.observe(sums.see)
        return sums.norms()


def stream_blocks(
    model: nn.Module,
    sites: list[Site],
    batches: Iterable[Tensor],
    *,
    device: torch.device | None = None,
    pruned_inputs: bool = True,
) -> Iterator[Block]:
    """Every block of the model that holds sites, in order, with its inputs for `batches` of token ids.

    What the caller does to a block decides what the next one sees; with `pruned_inputs` False each block sees what
    the blocks before it put out when they were yielded. `device`, if given, computes: blocks are moved there one at
    a time and back. Raises UnsupportedModel where blocks cannot be told, or are not called one after the other.
    """
    grouped = {block_path(group[0]): group for group in blocks_of(sites)}
    modules = _modules(model, grouped)
    home = next(model.parameters()).device
    stream = _Stream(model, list(modules.values()), device or home)
    stream.capture(batches)
    last = max(index for index, path in enumerate(modules) if path in grouped)
    for index, (path, module) in enumerate(itertools.islice(modules.items(), last + 1)):
        with _moved_to(module, device):
            block = Block(module, grouped.get(path, []), stream, index)
            following = None
            if not pruned_inputs and index < last:
                present = list(stream.hidden)
                block.advance()
                following, stream.hidden = stream.hidden, present
            if block.sites:
                yield block
            if following is not None:
                stream.hidden = following
            elif index < last:
                block.advance()


def blocks_of(sites: list[Site]) -> list[list[Site]]:
    """Sites by transformer block, in order: consecutive sites with the same first number in their name."""
    return [list(group) for _, group in itertools.groupby(sites, block_path)]


def block_path(site: Site) -> str:
    """The path of the block that a site belongs to, 'model.layers.3'; empty where its name has no number."""
    match = re.match(r"(.*?\.\d+)\.", site.name)
    return match.group(1) if match else ""


def _modules(model: nn.Module, grouped: dict[str, list[Site]]) -> dict[str, nn.Module]:
    """All blocks of the list that holds the sites' blocks, by path, those without sites included."""
    parents = {path.rpartition(".")[0] for path in grouped}
    if len(parents) != 1 or "" in grouped:
        raise UnsupportedModel(
            f"the sites lie in {sorted(parents)}: to stream a model its sites must lie in one list of numbered blocks"
        )
    parent = parents.pop()
    return {f"{parent}.{name}": module for name, module in model.get_submodule(parent).named_children()}


class _Stream:
    """Hidden states between two blocks, and how every block is called."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = [[] for _ in blocks]
        self.output: Callable[[Any], Tensor] = lambda answer: answer

    @torch.no_grad()
    def capture(self, batches: Iterable[Tensor]) -> None:
        """The first block's inputs and every block's other arguments for each batch."""
        home = next(self.model.parameters()).device
        answer: Any = None
        first: int | str = 0
        for batch in batches:
            if answer is None:  # one sequence shows what the first block answers; after that none needs to run
                seen, answer = _calls(self.model, self.blocks, batch[:1].to(home))
                carried, self.output = _carried(seen, answer)
                first = _place_of_hidden(seen[0], carried)
            seen, _ = _calls(self.model, self.blocks, batch.to(home), answer)
            self.hidden.append(_value(seen[0], first).to(self.device))
            for index, call in enumerate(seen):
                place = first if index == 0 else _place(call, self.output(answer))
                self.calls[index].append(_without(call, place))
        if not self.hidden:
            raise CurvatureUnavailable("there is no calibration text to stream through the model")


@dataclass
class _Seen:
    """One call of a block as the model made it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _calls(model: nn.Module, blocks: list[nn.Module], tokens: Tensor, answer: Any = None) -> tuple[list[_Seen], Any]:
    """How the model calls its blocks, and what they answered.

    Every block answers with `answer`; without one, the first block runs and its output is that answer. The forward
    ends where the last block would run.
    """
    seen: list[_Seen] = []
    answers = [] if answer is None else [answer]

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_Seen(args, dict(kwargs)))
        if answers and len(seen) == len(blocks):
            raise _Reached

    def answered(_: nn.Module, __: Any, output: Any) -> None:
        answers.append(output)
        if len(blocks) == 1:
            raise _Reached

    hooks = [block.register_forward_pre_hook(called, with_kwargs=True) for block in blocks]
    idle = blocks if answers else blocks[1:]
    if not answers:
        hooks.append(blocks[0].register_forward_hook(answered))
    for block in idle:
        block.forward = lambda *_, **__: answers[0]
    try:
        with contextlib.suppress(_Reached):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
        for block in idle:
            del block.forward
    if len(seen) != len(blocks):
        raise UnsupportedModel(f"one forward called {len(seen)} of {len(blocks)} blocks; this model cannot be streamed")
    return seen, answers[0]


def _carried(seen: list[_Seen], answer: Any) -> tuple[Tensor, Callable[[Any], Tensor]]:
    """The part of the first block's answer that the second one received, and how to take it out of an answer."""
    if isinstance(answer, Tensor):
        return answer, lambda found: found
    given = (*seen[1].args, *seen[1].kwargs.values()) if len(seen) > 1 else answer[:1]
    for index, part in enumerate(answer):
        if isinstance(part, Tensor) and any(part is x for x in given):
            return part, operator.itemgetter(index)
    raise UnsupportedModel("the second block receives nothing of what the first one puts out; it cannot be streamed")


def _place(seen: _Seen, hidden: Tensor) -> int | str:
    """The argument that is this very tensor."""
    for place, value in _arguments(seen):
        if value is hidden:
            return place
    raise UnsupportedModel("a block is not given what the block before it put out; this model cannot be streamed")


def _place_of_hidden(first: _Seen, answer: Tensor) -> int | str:
    """The first block's argument that is shaped like its answer."""
    for place, value in _arguments(first):
        if isinstance(value, Tensor) and value.shape == answer.shape and value.dtype == answer.dtype:
            return place
    raise UnsupportedModel("the first block receives nothing of the shape that it puts out; it cannot be streamed")


def _arguments(seen: _Seen) -> list[tuple[int | str, Any]]:
    return [*enumerate(seen.args), *seen.kwargs.items()]


def _value(seen: _Seen, place: int | str) -> Tensor:
    value = seen.args[place] if isinstance(place, int) else seen.kwargs[place]
    assert isinstance(value, Tensor)
    return value


def _without(seen: _Seen, place: int | str) -> Call:
    """The call without its hidden state, which must not be kept alive."""
    args = tuple(None if at == place else x for at, x in enumerate(seen.args))
    kwargs = {name: None if name == place else x for name, x in seen.kwargs.items()}
    return Call(args, kwargs, place)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(x, device) for x in value)
    return value


@contextlib.contextmanager
def _moved_to(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have a module on a device for a while."""
    if device is None:
        yield
        return
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)

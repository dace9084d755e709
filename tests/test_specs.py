"""Specs: what is written comes back the same, and what cannot be is refused by the path of the field."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseforge_core import specs
from sparseforge_core.errors import RecipeError
from sparseforge_core.specs import LARGEST, SPECS, decode, encode, is_spec, spec


class Part:
    """Base of the parts that a test recipe may hold."""


@spec("test-leaf")
class Leaf(Part):
    name: str
    size: int = 3
    share: float = 0.5
    on: bool = False

    def __post_init__(self) -> None:
        if self.size < 0:
            raise RecipeError(f"size={self.size}: must be 0 or more")


@spec("test-other", revision=2)
class Other(Part):
    mode: Literal["fast", "slow"] = "fast"


@spec("test-pinned", revision=3)
class Pinned(Part):
    id: str
    revision: str
    """Of something outside: the spec's own revision has to keep out of its way."""


@spec("test-tree")
class Tree(Part):
    first: Part
    rest: tuple[Leaf, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    label: str | int = ""


names = st.text(max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-LARGEST, LARGEST)
leaves = st.builds(Leaf, name=names, size=st.integers(0, LARGEST), share=finite, on=st.booleans())
others = st.builds(Other, mode=st.sampled_from(["fast", "slow"]))
trees = st.recursive(
    leaves | others,
    lambda parts: st.builds(
        Tree,
        first=parts,
        rest=st.lists(leaves, max_size=3).map(tuple),
        pair=st.tuples(whole, finite),
        limit=st.none() | whole,
        label=names | whole,
    ),
    max_leaves=4,
)


@given(part=trees, omit=st.booleans())
def test_json_and_back_is_the_same_spec(part: Part, omit: bool) -> None:
    text = json.dumps(encode(part, omit_defaults=omit), allow_nan=False)
    assert decode(json.loads(text), Part) == part


@given(part=trees)
def test_defaults_never_show_in_the_canonical_form(part: Part) -> None:
    full, short = encode(part, omit_defaults=False), encode(part)
    assert encode(decode(full, Part)) == short
    assert set(full) == {"kind", "revision", *(f.name for f in dataclasses.fields(part))}  # type: ignore[arg-type]


@given(one=trees, two=trees)
def test_different_specs_have_different_forms(one: Part, two: Part) -> None:
    assert (encode(one) == encode(two)) == (one == two)


json_scalars = st.none() | st.booleans() | st.integers() | finite | names
json_values = st.recursive(
    json_scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=3), max_leaves=5
)


@given(data=json_values)
def test_any_json_is_read_or_refused_with_a_sentence(data: Any) -> None:
    wrapped = {"kind": "test-tree", "first": {"kind": "test-leaf", "name": "a"}, "limit": data}
    if data is None or (type(data) is int and abs(data) <= LARGEST):
        assert decode(wrapped, Part) == Tree(first=Leaf(name="a"), limit=data)
    else:
        with pytest.raises(RecipeError, match=r"^part\.limit: expected"):
            decode(wrapped, Part)


def test_a_field_called_revision_keeps_its_name() -> None:
    pinned = Pinned(id="a", revision="4f1c09d")
    assert encode(pinned) == {"id": "a", "kind": "test-pinned", "revision": "4f1c09d", "spec_revision": 3}
    assert decode(encode(pinned), Part) == pinned
    with pytest.raises(RecipeError, match="written for revision 2 of 'test-pinned', this code has revision 3"):
        decode({**encode(pinned), "spec_revision": 2}, Part)


def test_a_field_equal_to_its_default_is_left_out() -> None:
    assert encode(Leaf(name="a", size=3)) == {"kind": "test-leaf", "name": "a", "revision": 1}
    assert encode(Leaf(name="a", size=4))["size"] == 4


def test_a_whole_number_is_no_default_of_a_real_one() -> None:
    # 1 and True, 2 and 2.0 are equal in Python but not in JSON: leaving them out would change what is read back.
    assert "pair" in encode(Tree(first=Leaf(name="a"), pair=(1, 3.0)))
    assert encode(Leaf(name="a", on=0))["on"] == 0  # type: ignore[arg-type]


def test_a_real_field_takes_a_whole_number() -> None:
    read = decode({"kind": "test-leaf", "name": "a", "share": 2}, Leaf)
    assert type(read.share) is float
    assert read.share == 2.0


def test_specs_cannot_be_changed_or_given_by_position() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Leaf(name="a").name = "b"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Leaf("a")  # type: ignore[misc]


LEAF = {"kind": "test-leaf", "name": "a"}
TREE = {"kind": "test-tree", "first": LEAF}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", r"^part: expected an object with a 'kind', found str 'text'$"),
        ({"kind": "test-leef", "name": "a"}, r"^part: unknown kind 'test-leef'\. Did you mean 'test-leaf'\?"),
        ({**LEAF, "sise": 1}, r"^part: unknown field of 'test-leaf' 'sise'.*'size'"),
        ({"kind": "test-leaf"}, r"^part: 'test-leaf' lacks name$"),
        ({**LEAF, "size": 1.0}, r"^part\.size: expected int, found float 1\.0$"),
        ({**LEAF, "size": True}, r"^part\.size: expected int, found bool True$"),
        ({**LEAF, "size": -1}, r"^part: size=-1: must be 0 or more$"),
        ({**LEAF, "on": 1}, r"^part\.on: expected bool, found int 1$"),
        ({**LEAF, "name": 7}, r"^part\.name: expected str, found int 7$"),
        ({**LEAF, "share": math.inf}, r"^part\.share: expected float, found float inf$"),
        ({"kind": "test-other", "mode": "quick"}, r"^part\.mode: unknown value 'quick'.*Known: fast, slow"),
        (
            {"kind": "test-other", "revision": 1},
            r"^part: written for revision 1 of 'test-other', this code has revision 2",
        ),
        ({"kind": "test-tree", "first": 1}, r"^part\.first: expected an object with a 'kind', found int 1$"),
        ({**TREE, "pair": [1]}, r"^part\.pair: expected 2 items, found 1$"),
        ({**TREE, "rest": {}}, r"^part\.rest: expected a list"),
        ({**TREE, "rest": [{"kind": "test-other"}]}, r"^part\.rest\[0\]: unknown kind 'test-other'"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        decode(data, Part)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_json_form_are_refused(value: float) -> None:
    with pytest.raises(RecipeError, match="give a finite number"):
        encode(Leaf(name="a", share=value))


def test_an_object_that_is_no_spec_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot hold a Part"):
        encode(Tree(first=Part()))
    assert not is_spec(Part())
    assert is_spec(Leaf(name="a"))


def test_two_specs_cannot_share_a_kind() -> None:
    with pytest.raises(RecipeError, match="two specs are called 'test-leaf'"):

        @spec("test-leaf")
        class Another:
            pass


def test_every_registered_spec_knows_its_kind_and_has_readable_fields() -> None:
    import sparseforge_core.evaluate.suites
    import sparseforge_core.recipe  # noqa: F401 - registers everything that a recipe may hold

    for kind, cls in SPECS.items():
        assert cls.kind == kind
        assert cls.spec_revision >= 1
        assert dataclasses.is_dataclass(cls)
        assert set(specs._hints(cls)) >= {field.name for field in dataclasses.fields(cls)}

"""What is kept of a docstring: sentences; not code, tables, references or what was said before."""

from __future__ import annotations

import inspect

import pytest

from sparseforge_core.data.english import Seen, paragraphs

DOCSTRING = """
    Solve the equation for the unknown vector.

    Notes
    -----
    The solver follows :func:`~package.linalg.solve` and keeps the *order* of the rows that it
    was given [1]_. Wherever `rows` repeat, only the first of them is used by the solver; this is an example::

        solve(rows)

    Parameters
    ----------
    rows : ndarray
        Rows.
    names : list
        Names.

    - The first item of a list is a whole sentence that ends in a full stop.
    - and a fragment that does not

    strict
        Whether an equation that cannot be solved is reported as an error or left out of the result.

    >>> solve([1, 2])
    [3, 4]

    | a | drawing |
    +---+---------+

    .. [1] Smith, J. and Jones, A. Solving of Equations, Journal of Equations, 12:1-20, 1990.

    :param rows: The rows that are to be solved, which must be of the same length as the names are.

    Returns:
      The vector that solves the equation, or nothing if there is none to be found by this solver.
"""

KEPT = [
    "The solver follows solve and keeps the order of the rows that it was given.",
    "The first item of a list is a whole sentence that ends in a full stop.",
    "Whether an equation that cannot be solved is reported as an error or left out of the result.",
    "The vector that solves the equation, or nothing if there is none to be found by this solver.",
]


def test_sentences_are_kept_and_the_rest_is_not() -> None:
    assert paragraphs(inspect.cleandoc(DOCSTRING)) == KEPT


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be kept.",
        "lower case at the start is a fragment of something that was cut off before it.",
        "Smith, J. and Jones, A. Equations Solved, Annals of Mathematics and Statistics, Wiley.",
        "The Greek \\alpha is in the formula that is shown in the text of the page above this one.",
        "x = f(a) + g(b); y = x if x > 0 else -x; z = [x, y, x * y, x ** y]; w = {x: y for x, y in z}.",
        "Red Green Blue Yellow Purple Orange Brown Black White Grey Pink Cyan Magenta Lime Navy Teal.",
        "A paragraph without any full stop is a heading or a table and so it is not kept at all",
    ],
)
def test_what_is_not_english_prose_is_left_out(text: str) -> None:
    assert paragraphs(text) == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (":class:`.Session`", "Session"),
        (":meth:`_orm.Session.get`", "get"),
        (":ref:`the chapter <chapter-1>`", "the chapter"),
        ("`a page <https://example.org>`_", "a page"),
        ("``None``", "None"),
        ("**never**", "never"),
        ("NumPy_", "NumPy"),
        ("``:memory:``", ":memory:"),
    ],
)
def test_markup_becomes_what_a_reader_sees(written: str, shown: str) -> None:
    text = "This is the sentence in which there is %s for the reader to see on the page."
    assert paragraphs(text % written) == [text % shown]


def test_copies_are_left_out_even_with_a_few_changed_words() -> None:
    seen = Seen()
    text = "The function returns the largest value of the array along the axis that was given, or of all of it."
    assert seen.fresh(text)
    assert not seen.fresh(text)
    assert not seen.fresh(text.replace("largest", "smallest").upper())
    assert seen.fresh("A graph is connected if there is a path between any two of its nodes, however long it is.")

"""The scan finds what was planted, nothing that was not, once per corpus and items."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_core.data.corpora import Corpus, Synthetic, TextFiles, held_out
from sparseforge_core.errors import DataError
from sparseforge_core.evaluate.contamination import contaminated, findings, item_texts
from sparseforge_core.evaluate.ngrams import BATCH_WORDS, Wanted, words_of

LEXICON = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in ("n", "r", "st", "ck", "m")]
"""275 words: few enough that shorter runs repeat by chance, many enough that 13 in a row never do."""


def sentence(draw: random.Random, words: int) -> list[str]:
    return [draw.choice(LEXICON) for _ in range(words)]


def dressed(draw: random.Random, words: list[str]) -> str:
    """The same words as another text would have them: capitals, punctuation, line ends."""
    marks = (" ", ", ", ".  ", "\n", "; ", " - ", "! (", ") ", "'s_"[2:] + " ")
    return "".join((w.upper() if draw.random() < 0.2 else w) + draw.choice(marks) for w in words)


def planted(seed: int, count: int) -> tuple[list[list[str]], list[str], set[int]]:
    """(items, documents, items hidden in the documents): every second item is copied in part or whole."""
    draw = random.Random(seed)
    items, documents, hidden = [], [], set()
    for number in range(count):
        texts = [sentence(draw, draw.randint(8, 60)) for _ in range(draw.randint(1, 4))]
        items.append([dressed(draw, text) for text in texts])
        background = sentence(draw, draw.randint(0, 300))
        if number % 2:
            text = draw.choice(texts)
            length = min(13, len(text))
            start = draw.randint(0, len(text) - length)
            at = draw.randint(0, len(background))
            background[at:at] = text[start : start + length]
            hidden.add(number)
        documents.append(dressed(draw, background))
    draw.shuffle(documents)
    return items, documents, hidden


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_was_planted_is_found_and_nothing_else(seed: int) -> None:
    items, documents, hidden = planted(seed, 120)
    wanted = Wanted(items, n=13, shortest=8)
    assert set(wanted.find(documents).found) == hidden
    clean = [document for _, document in zip(range(40), map(" ".join, clean_text(seed)), strict=False)]
    assert not wanted.find(clean).found


def clean_text(seed: int) -> Iterator[list[str]]:
    draw = random.Random(~seed)
    while True:
        yield sentence(draw, 200)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abc"), min_size=3, max_size=12))
def test_a_match_is_what_the_definition_says(document: list[str], text: list[str]) -> None:
    n, shortest = 6, 3
    grams = [text[i : i + n] for i in range(max(1, len(text) - n + 1))]
    expected = any(document[i : i + len(g)] == g for g in grams for i in range(len(document) - len(g) + 1))
    found = Wanted([[" ".join(text)]], n=n, shortest=shortest).find([" ".join(document)]).found
    assert (0 in found) == expected


def test_no_gram_spans_two_documents_and_batches_lose_none() -> None:
    words = [f"w{i}" for i in range(13)]
    wanted = Wanted([[" ".join(words)]], n=13, shortest=8)
    assert not wanted.find([" ".join(words[:6]), " ".join(words[6:])]).found
    filler = " ".join(f"x{i % 977}" for i in range(BATCH_WORDS - 5))
    assert wanted.find([filler, " ".join(words), filler]).found == {0: " ".join(words)}


def test_texts_too_short_to_tell_are_reported_and_not_counted() -> None:
    wanted = Wanted([["one two three four five six seven"], ["a b c d e f g h"]], n=13, shortest=8)
    assert wanted.too_short == [0]
    found = wanted.find(["before one two three four five six seven a b c d e f g h after"]).found
    assert set(found) == {1}


def test_words_are_lower_case_and_alphanumeric() -> None:
    assert words_of("It's 3.5 x_y, NAÏVE—ok?") == ["it", "s", "3", "5", "x", "y", "naïve", "ok"]


@pytest.mark.parametrize(
    ("task", "document", "texts"),
    [
        ("arc_easy", {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}, ["Q? a", "Q? b"]),
        ("winogrande", {"sentence": "The _ is", "option1": "cup", "option2": "mug"}, ["The cup is", "The mug is"]),
        ("boolq", {"passage": "P", "question": "q"}, ["P", "q"]),
    ],
)  # fmt: skip
def test_an_items_texts_are_its_own_words(task: str, document: dict[str, object], texts: list[str]) -> None:
    assert item_texts(task, document) == texts


def written(folder: Path, documents: list[str]) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return TextFiles.of(path)


def test_a_corpus_is_scanned_once_and_the_finding_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    home = tmp_path / "home"
    items, documents, hidden = planted(7, 60)
    training = [document for document in documents if not held_out(document)]
    corpus = written(tmp_path, documents)
    expected = set(Wanted(items, n=13, shortest=8).find(training).found)
    assert len(expected) >= 0.9 * len(hidden)
    (row,) = contaminated(corpus, home, {"task": items})
    assert row["metric"] == "task/contaminated"
    assert (row["value"], row["n"]) == (len(expected) / 60, 60)
    assert row["detail"]["doc_ids"] == sorted(expected)
    assert row["detail"]["ngram"] == 13
    assert caplog.text.count("looked for") == 1
    assert contaminated(corpus, home, {"task": items}) == (row,)
    assert caplog.text.count("looked for") == 1
    both = findings(corpus, home, {"task": items, "other": items[:5]})
    assert both["other"]["items"] == 5
    assert caplog.text.count("looked for 5 items") == 1
    assert contaminated(corpus, home, {"task": items}, n=20)[0]["detail"]["ngram"] == 20


def test_a_damaged_finding_is_made_anew_and_a_clean_corpus_raises_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items, _, _ = planted(3, 40)
    (row,) = contaminated(Synthetic(), tmp_path, {"task": items})
    assert row["value"] == 0.0
    (path,) = tmp_path.glob("contamination/*/task-*.json")
    path.write_text(path.read_text().replace('"items": 40', '"items": 41'))
    assert contaminated(Synthetic(), tmp_path, {"task": items}) == (row,)
    assert "is damaged" in caplog.text
    with pytest.raises(DataError, match="1-grams finds everything"):
        contaminated(Synthetic(), tmp_path, {"task": items}, n=1)

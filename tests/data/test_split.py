"""Training and validation text never overlap and leave nothing out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snugpt.data.split import choose_split, validation_bytes

documents_lists = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1)


def _sides(documents: list[str], num_validation_bytes: int) -> dict[str, list[tuple[int, str]]]:
    split = choose_split(documents, num_validation_bytes)
    sides: dict[str, list[tuple[int, str]]] = {"train": [], "validation": []}
    for number, document in enumerate(documents):
        for side, text in split.parts(document):
            sides[side].append((number, text))
    return sides


@given(documents_lists, st.integers(1, 200))
def test_split_is_disjoint_and_covering(documents: list[str], wanted_bytes: int) -> None:
    sides = _sides(documents, min(wanted_bytes, sum(map(len, documents))))
    train, validation = dict(sides["train"]), dict(sides["validation"])
    for number, document in enumerate(documents):
        assert train.get(number, "") + validation.get(number, "") == document


def test_many_documents_are_split_whole_and_by_content_alone() -> None:
    documents = [f"document {n} " * 5 for n in range(400)]
    total_bytes = sum(map(len, documents))
    sides = _sides(documents, total_bytes // 20)
    validation = {text for _, text in sides["validation"]}
    assert validation < set(documents)
    assert 0.05 <= sum(map(len, validation)) / total_bytes < 0.06
    reverse = _sides(documents[::-1], total_bytes // 20)
    assert {text for _, text in reverse["validation"]} == validation


def test_equal_documents_are_on_one_side() -> None:
    sides = _sides([f"document {n % 100}" for n in range(400)], 200)
    train, validation = ({text for _, text in side} for side in sides.values())
    assert not train & validation


def test_single_document_gives_its_last_part() -> None:
    assert _sides(["0123456789" * 10], 5) == {
        "train": [(0, ("0123456789" * 10)[:95])],
        "validation": [(0, "56789")],
    }


def test_one_huge_document_does_not_become_validation() -> None:
    for seed in range(20):
        sides = _sides([f"{seed} small", "x" * 10_000], 500)
        assert sum(len(text) for _, text in sides["validation"]) < 1_000


def test_corpus_of_one_text_repeated_still_leaves_training_text() -> None:
    assert _sides(["ab", "ab"], 2)["train"] == [(0, "a"), (1, "a")]


def test_validation_is_a_twentieth_but_at_least_a_row_and_at_most_half() -> None:
    assert validation_bytes(1_000_000, 100) == 50_000
    assert validation_bytes(1_000, 100) == 100
    assert validation_bytes(1_000, 900) == 500

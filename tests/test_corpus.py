"""Does a sample of the corpus of small files come back as it must? `python tests/corpus.py` runs all of it."""

from __future__ import annotations

import corpus
import pytest

CASES = [case for case in corpus.cases() if not case.name.startswith("ImageMagick")]
SAMPLE = CASES[:: max(1, len(CASES) // 60)][:60]


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.name.split()[0] for case in SAMPLE} >= {"PNG", "JPEG", "TIFF", "WEBP", "AVIF", "GIF"}


@pytest.mark.parametrize("number", range(60))
def test_a_picture_of_any_kind_goes_there_and_back(number: int) -> None:
    way = list(corpus.WAYS)[number % len(corpus.WAYS)]
    assert corpus.problems(SAMPLE[number], way) == []

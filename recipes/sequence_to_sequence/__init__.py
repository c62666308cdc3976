"""Sequence to sequence: an encoder-decoder of transformers on pairs of texts, such as translations."""

from recipes.sequence_to_sequence.baselines import Baselines
from recipes.sequence_to_sequence.data import PairData
from recipes.sequence_to_sequence.module import Seq2Seq
from recipes.sequence_to_sequence.pronunciation import cmudict

__all__ = ["Baselines", "PairData", "Seq2Seq", "cmudict"]

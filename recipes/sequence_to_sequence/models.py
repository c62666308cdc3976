"""Any encoder-decoder of transformers, by the name of its family and plain arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

from recipes.language_model.transformers_models import from_family
from recipes.sequence_to_sequence.vocabulary import END, PADDING


def transformers_seq2seq(model_type: str, **overrides: Any) -> nn.Module:
    """An encoder-decoder with initial weights; nothing is downloaded.

    Args:
        model_type: the family, such as ``"bart"``, ``"t5"`` or ``"marian"``.
        overrides: arguments of the family's config, such as ``vocab_size`` and ``d_model``. Numbers of special tokens
            are those of :mod:`recipes.sequence_to_sequence.vocabulary`.

    Raises:
        ValueError: transformers has no such family, or no encoder-decoder of it, or its config has no such argument.
    """
    # Imported here: it takes seconds, and only this model needs it.
    from transformers import AutoModelForSeq2SeqLM

    tokens = {"pad_token_id": PADDING, "bos_token_id": PADDING, "eos_token_id": END}
    decoder = {"decoder_start_token_id": PADDING, "forced_eos_token_id": None}
    return from_family(AutoModelForSeq2SeqLM, model_type, overrides, {**tokens, **decoder})

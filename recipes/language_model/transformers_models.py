"""Any causal language model of transformers, by the name of its family and plain arguments."""

from __future__ import annotations

from typing import Any

from torch import nn


def transformers_causal_lm(model_type: str, **overrides: Any) -> nn.Module:
    """A causal language model with initial weights; nothing is downloaded.

    Args:
        model_type: the family, such as ``"llama"`` or ``"gpt2"``.
        overrides: arguments of the family's config, such as ``vocab_size`` and ``hidden_size``. Token numbers that
            the config names by default (padding, begin, end) are dropped: the data has its own.

    Raises:
        ValueError: transformers has no such family, or no causal language model of it, or its config has no such
            argument.
    """
    # Imported here: it takes seconds, and only this model needs it.
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults = {"use_cache": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(model_type)  # raises a ValueError that lists the families
    unknown = [name for name in overrides if not hasattr(config, name) and name not in _ALWAYS_KNOWN]
    if unknown:
        raise ValueError(
            f"the config of transformers' {model_type} has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(config.to_dict()))}"
        )
    config = AutoConfig.for_model(model_type, **{**defaults, **overrides})
    arguments = {}
    if "attn_implementation" in overrides:
        arguments["attn_implementation"] = overrides["attn_implementation"]
    return AutoModelForCausalLM.from_config(config, **arguments)


_ALWAYS_KNOWN = ("attn_implementation", "dtype", "tie_word_embeddings", "vocab_size")

"""Any causal language model of transformers: by the name of its family and plain arguments, or of a directory.

[Note: late transformers]
transformers is imported where it is used: it takes seconds, and only these models need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    from transformers import AutoModelForCausalLM  # See [Note: late transformers]

    return from_family(AutoModelForCausalLM, model_type, overrides, {"bos_token_id": None, "eos_token_id": None})


def transformers_checkpoint(path: str | Path, **overrides: Any) -> nn.Module:
    """The causal language model of a directory that ``save_pretrained`` wrote, in float32 and with initial weights:
    ``HybridStrategy(pretrained=path)`` reads the directory's, each rank what it owns.

    Args:
        path: with ``config.json`` and ``*.safetensors``, in parts with an index or in one.
        overrides: arguments of the config, such as ``attention_dropout``.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: its config has no such argument, or is of no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; pass one that save_pretrained of transformers wrote as model.path=..."
        )
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_known(config, str(folder), overrides)
    config.use_cache = False
    arguments = {"dtype": overrides.pop("dtype", torch.float32)}
    if "attn_implementation" in overrides:
        arguments["attn_implementation"] = overrides.pop("attn_implementation")
    for name, value in overrides.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, **arguments)


def from_family(kind: Any, model_type: str, overrides: dict[str, Any], tokens: dict[str, int | None]) -> nn.Module:
    """A model of transformers with initial weights.

    Args:
        kind: an ``AutoModel`` class.
        model_type: the family.
        overrides: arguments of its config.
        tokens: numbers of tokens in place of those that the config names by default, which are not the data's.

    Raises:
        ValueError: see :func:`transformers_causal_lm`.
    """
    from transformers import AutoConfig

    defaults = {"use_cache": False, "pad_token_id": None, **tokens}
    config = AutoConfig.for_model(model_type)  # raises a ValueError that lists the families
    _check_known(config, model_type, overrides)
    config = AutoConfig.for_model(model_type, **{**defaults, **overrides})
    arguments = {}
    if "attn_implementation" in overrides:
        arguments["attn_implementation"] = overrides["attn_implementation"]
    return kind.from_config(config, **arguments)


def _check_known(config: Any, whose: str, overrides: dict[str, Any]) -> None:
    unknown = [name for name in overrides if not hasattr(config, name) and name not in _ALWAYS_KNOWN]
    if unknown:
        raise ValueError(
            f"the config of transformers' {whose} has no {', '.join(unknown)}; it has "
            f"{', '.join(sorted(config.to_dict()))}"
        )


_ALWAYS_KNOWN = ("attn_implementation", "dtype", "tie_word_embeddings", "vocab_size")

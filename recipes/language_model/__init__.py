"""Language modelling: a causal decoder, or any of transformers', on the tokens of a text."""

from recipes.language_model.baselines import Baselines
from recipes.language_model.completions import PromptCompletionData
from recipes.language_model.data import TextData
from recipes.language_model.decoder import Decoder
from recipes.language_model.module import CausalLM
from recipes.language_model.save_pretrained import SavePretrained
from recipes.language_model.stored import StoredText

__all__ = [
    "Baselines",
    "CausalLM",
    "Decoder",
    "PromptCompletionData",
    "SavePretrained",
    "StoredText",
    "TextData",
]

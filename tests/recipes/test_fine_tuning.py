"""Fine-tuning of a causal model of transformers: from its directory under layouts, on text or completions, and back."""

from __future__ import annotations

import json
import math
import sys
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_dist import HybridStrategy
from recipes import job
from recipes.config_errors import ConfigError
from recipes.experiments import Experiment
from recipes.language_model import CausalLM, Decoder, PromptCompletionData, SavePretrained, TextData
from recipes.language_model.corpus import train_tokenizer
from recipes.language_model.sources import Document, docstrings
from recipes.language_model.tokenizers_of_models import GivenTokenizer, bytes_of_tokens
from recipes.language_model.transformers_models import transformers_checkpoint
from recipes.optimization import parameter_groups, warmup_cosine
from recipes.pairs import Pair
from tests.launch.commands import run
from tests.support.parity import QUIET, Run, assert_equal, on_layout, slow, train
from tests.support.ranks import run_on_ranks

VOCABULARY, LENGTH = 300, 24
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * 6 for i in range(30)]
PAIRS = [Pair(f"what is {i}? ", " and ".join(["it"] * (1 + 3 * (i % 3)))) for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a small Llama, in several files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer = train_tokenizer(TEXTS, 280)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    return folder


def completions(model: Path, **options: Any) -> PromptCompletionData:
    parts = {"train": PAIRS[:40], "val": PAIRS[40:50], "test": PAIRS[50:]}
    return PromptCompletionData(model, otherwise=lambda: parts, sequence_length=64, batch_size=4, **options)


def tuned(network: Any, **options: Any) -> CausalLM:
    return CausalLM(network, partial(torch.optim.AdamW, lr=1e-3, eps=1e-6), warmup_cosine, **options)


def quiet(**arguments: Any) -> L.Trainer:
    return L.Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, **arguments})


# ---------------------------------------------------------------- data


def test_only_completions_and_their_ends_are_learned(model: Path) -> None:
    data = completions(model)
    data.prepare_data()
    data.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = next(iter(data.val_dataloader()))
    columns = (batch[name] for name in ("inputs", "targets", "num_targets"))
    for pair, inputs, targets, count in zip(PAIRS[40:44], *columns, strict=True):
        learned = targets[targets != -100]
        assert tokenizer.decode(learned) == pair.target + "<|endoftext|>"
        assert len(learned) == count
        # each target stands where its input is the token before
        (places,) = (targets != -100).nonzero(as_tuple=True)
        assert torch.equal(inputs[places[1:]], targets[places[:-1]])
        assert tokenizer.decode(inputs[: places[0] + 1]) == "<|endoftext|>" + pair.source
    assert batch["num_bytes"].tolist() == [len(pair.target) for pair in PAIRS[40:44]]
    with pytest.raises(ValueError, match=r"data.sequence_length=5; pass data.sequence_length=\d+"):
        PromptCompletionData(
            model, otherwise=lambda: {"train": PAIRS, "val": PAIRS, "test": PAIRS}, sequence_length=5
        ).setup("fit")


def test_text_is_read_with_the_tokenizer_of_the_model(model: Path, tmp_path: Path) -> None:
    data = TextData(
        lambda: [Document(str(i), text) for i, text in enumerate(TEXTS)],
        sequence_length=LENGTH, batch_size=4, cache=tmp_path, tokenizer=model, test_documents=["7"],
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    end, *tokens = data.corpus.tokens["test"].tolist()
    assert AutoTokenizer.from_pretrained(model).decode(tokens) == TEXTS[7] + "<|endoftext|>"
    assert end == tokens[-1]
    assert sum(int(batch["num_bytes"].sum()) for batch in data.test_dataloader()) == len(TEXTS[7])


@pytest.mark.parametrize("strategy", ["auto", "hybrid"])
def test_a_model_that_lacks_tokens_of_a_given_tokenizer_is_refused(strategy: str, model: Path, tmp_path: Path) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    options: dict[str, Any] = {"cache": tmp_path, "tokenizer": model, "test_documents": ["7"]}
    data = TextData(lambda: documents, sequence_length=LENGTH, batch_size=4, **options)
    for network in (
        partial(Decoder, 100, width=16, depth=1, num_heads=2),
        partial(LlamaForCausalLM, LlamaConfig(**{**SIZES, "vocab_size": 100})),
    ):
        chosen = HybridStrategy({}) if strategy == "hybrid" else "auto"
        with pytest.raises(ValueError, match=r"280 tokens, and the network's embedding 100; pass data\.vocab_size=280"):
            quiet(max_steps=1, strategy=chosen).fit(tuned(network), datamodule=data)


def test_a_directory_without_a_tokenizer_or_its_end_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pass a directory to which transformers saved a fast"):
        GivenTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="names no eos_token"):
        GivenTokenizer.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; pass one that save_pretrained"):
        transformers_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"has no hidden_sise; it has .*hidden_size"):
        transformers_checkpoint(model, hidden_sise=3)


def test_bytes_of_tokens_of_both_kinds(model: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    byte_level = GivenTokenizer.read(model).load()
    text = "def naïve():\n"
    sizes = bytes_of_tokens(byte_level, "<|endoftext|>")
    assert sum(sizes[byte_level.encode(text).ids]) == len(text.encode())
    pieces = Tokenizer(models.BPE({"</s>": 0, "<0x0A>": 1, "▁ï": 2, "▁": 3}, [], byte_fallback=True))
    pieces.decoder = decoders.ByteFallback()
    assert bytes_of_tokens(pieces, "</s>").tolist() == [0, 1, 3, 1]


def test_docstrings_are_those_of_the_library() -> None:
    found = docstrings(60_000)
    assert 40_000 < sum(document.num_bytes for document in found) <= 60_000
    assert found == docstrings(60_000)
    library = Path(sysconfig.get_path("stdlib"))
    for document in found:
        source = "".join((library / document.name).read_text("utf-8", errors="replace").split())
        lines = [line for line in document.text.splitlines() if "\\" not in line]
        assert sum("".join(line.split()) in source for line in lines) >= 0.95 * len(lines), document.name
        assert not any(line.startswith(("import ", "class ")) and line.endswith(":") for line in lines)


# ---------------------------------------------------------------- training


def theirs(folder: Path) -> CausalLM:
    """The same module in one process around what transformers loads itself."""
    return tuned(partial(AutoModelForCausalLM.from_pretrained, folder, use_cache=False))


def ours(folder: Path) -> CausalLM:
    return tuned(partial(transformers_checkpoint, folder))


class Answers(Dataset):
    """Completions, long ones together: data ranks have different numbers of targets."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(3, 280, (count, LENGTH + 1), generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = 3 if index // 4 % 2 else LENGTH - 2 - index % 3
        targets = self.tokens[index, 1:].clone()
        targets[:first] = -100
        count = torch.tensor(LENGTH - first)
        return {"inputs": self.tokens[index, :-1], "targets": targets, "num_targets": count} | {
            "num_bytes": 2 * count, "unigram_micronats": 5_000_000 * count,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [slow("dp_shard=2", 2), ("tp=2", 2), slow("pp=2", 2), slow("dp_shard=2,tp=2", 4), slow("pp=2,dp_shard=2", 4)],
)
def test_fine_tuning_equals_one_process_of_transformers(layout: str, num_ranks: int, model: Path) -> None:
    """The mean over the answers' tokens too, of which ranks and microbatches have different numbers."""
    run = Run(
        partial(ours, model),
        partial(Answers, 96),
        partial(Answers, 13),
        batch_size=8,
        trainer={"gradient_clip_val": 1.0},
    )
    one = train(replace(run, module=partial(theirs, model)), None)
    for record in on_layout(replace(run, strategy={"pretrained": model}), layout, num_ranks):
        assert_equal(one, record)


def test_the_loss_of_answers_is_the_mean_over_their_tokens(model: Path) -> None:
    batch = next(iter(torch.utils.data.DataLoader(Answers(8), batch_size=8)))
    module = theirs(model).eval()
    module.configure_model()
    logs = module(batch["inputs"]).log_softmax(-1)
    nats = [-logs[i, j, t] for i, row in enumerate(batch["targets"]) for j, t in enumerate(row) if t != -100]
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    assert float(module.training_step(batch, 0)) == pytest.approx(float(torch.stack(nats).mean()), rel=1e-5)


# ---------------------------------------------------------------- what trains, and how fast


def test_frozen_parameters_stay_and_others_have_their_rates(model: Path) -> None:
    module = tuned(
        partial(AutoModelForCausalLM.from_pretrained, model),
        freeze=["model.embed_tokens.*", "model.layers.0.*"], learning_rates={"lm_head.*": 0.5, "*.mlp.*": 0.25},
    )  # fmt: skip
    module.configure_model()
    frozen = {name for name, p in module.network.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in module.network.named_parameters() if name.startswith(("model.embed", "model.layers.0."))
    }
    quiet(max_steps=1).fit(module, torch.utils.data.DataLoader(Answers(8), batch_size=4))
    built: Any = module.optimizers(use_pl_optimizer=False)
    names = {p: name for name, p in module.network.named_parameters()}
    rates = {names[p]: group["initial_lr"] for group in built.param_groups for p in group["params"]}
    assert set(rates) == set(names.values()) - frozen
    for name, rate in rates.items():
        assert rate == {"lm_head.weight": 0.5}.get(name, 0.25 if ".mlp." in name else 1e-3), name
    without = {names[p] for g in built.param_groups for p in g["params"] if g["weight_decay"] == 0}
    assert without == {name for name in rates if "norm" in name}


def test_a_pattern_that_fits_nothing_is_refused(model: Path) -> None:
    with pytest.raises(
        ValueError, match=r"recipe.freeze: no parameter fits 'model.layer.\*'; their names are model.embed"
    ):
        tuned(partial(transformers_checkpoint, model), freeze=["model.layer.*"]).configure_model()
    with pytest.raises(ValueError, match=r"recipe\.learning_rates: no parameter fits 'head'"):
        parameter_groups(nn.Linear(2, 2), None, {"head": 1.0})


# ---------------------------------------------------------------- and back


def _tune_and_save(layout: str, model: Path, folder: Path) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    data = completions(model)
    module = tuned(partial(transformers_checkpoint, model))
    trainer = L.Trainer(
        **{**QUIET, "enable_checkpointing": True},
        devices=2, strategy=HybridStrategy(layout, pretrained=model), max_steps=2, limit_val_batches=0,
        callbacks=[ModelCheckpoint(folder / "checkpoints", save_last=True), SavePretrained(folder / "saved", "last")],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    from tests.support.parity import whole_weights

    return whole_weights(module)


@pytest.mark.parametrize("layout", ["dp_shard=2", slow("tp=2"), slow("pp=2")])
def test_what_was_tuned_is_opened_by_from_pretrained(layout: str, model: Path, tmp_path: Path) -> None:
    weights = run_on_ranks(2, _tune_and_save, layout, model, tmp_path)[0]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    begun = AutoModelForCausalLM.from_pretrained(model)
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name
    assert any(not torch.equal(a, b) for a, b in zip(opened.parameters(), begun.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    assert tokenizer.eos_token == "<|endoftext|>"


def test_what_can_not_be_saved_is_told_before_training(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="those of a ModelCheckpoint, and this run has none; save the last ones"):
        quiet(callbacks=[SavePretrained(tmp_path / "saved")]).fit(ours(model), torch.utils.data.DataLoader(Answers(8)))
    module = tuned(partial(Decoder, VOCABULARY, 16, 1, 2))
    with pytest.raises(ValueError, match="only a model of transformers can be saved"):
        quiet(callbacks=[SavePretrained(tmp_path / "saved", "last")]).fit(
            module, torch.utils.data.DataLoader(Answers(8))
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is there and no model of transformers; name another directory"):
        quiet(callbacks=[SavePretrained(tmp_path / "mine", "last")]).fit(
            ours(model), torch.utils.data.DataLoader(Answers(8))
        )
    with pytest.raises(ValueError, match="weights='middle'; choose best or last"):
        SavePretrained(tmp_path, "middle")  # type: ignore[arg-type]


# ---------------------------------------------------------------- from the command line


def _asked(model: Path, tmp_path: Path, *more: str) -> list[str]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": p.source, "completion": p.target}) + "\n" for p in PAIRS))
    common = ["recipe=language_model", "model=transformers_checkpoint", f"model.path={model}", "data=prompt_completion"]
    shares = ["data.val_fraction=0.2", "data.test_fraction=0.2", "data.batch_size=4", "trainer.max_steps=2"]
    return [
        sys.executable,
        "-m",
        "recipes.train",
        *common,
        f"data.path={file}",
        *shares,
        "trainer.max_epochs=-1",
        *more,
        f"hydra.run.dir={tmp_path}/run",
    ]


def _measured(model: Path, pairs: list[Pair]) -> float:
    """Nats per token of completions by transformers alone."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    nats, count = 0.0, 0
    for pair in pairs:
        given = [tokenizer.eos_token_id, *tokenizer(pair.source)["input_ids"]]
        tokens = torch.tensor([[*given, *tokenizer(pair.target)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = network(tokens[:, :-1]).logits[0]
        learned = tokens[0, len(given) :]
        nats += float(F.cross_entropy(logits[len(given) - 1 :], learned, reduction="sum"))
        count += len(learned)
    return nats / count


@pytest.mark.slow
def test_a_command_tests_first_tunes_and_saves(model: Path, tmp_path: Path) -> None:
    from recipes.pairs import pair_parts

    asked = ["test_first=true", "trainer.devices=2", "strategy.layout.dp_shard=2", "strategy.layout.dp_replicate=1"]
    saving = [
        "+callbacks.save_pretrained._target_=recipes.language_model.SavePretrained",
        f"+callbacks.save_pretrained.directory={tmp_path}/saved",
        "+callbacks.save_pretrained.weights=last",
        "weights=last",
    ]
    done = run(_asked(model, tmp_path, *asked, *saving))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    parts = pair_parts(tmp_path / "pairs.jsonl", fields=("prompt", "completion"), val_fraction=0.2, test_fraction=0.2)
    assert result["first/test/loss"] == pytest.approx(_measured(model, list(parts["test"])), rel=1e-4)
    assert result["test/loss"] == pytest.approx(_measured(tmp_path / "saved", list(parts["test"])), rel=1e-4)
    assert result["test/loss"] < result["first/test/loss"]
    assert math.isfinite(result["test/loss_per_byte"])
    # and without training it is that model which is tested
    done = run(_asked(model, tmp_path, "train=false", "trainer.devices=1"))
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert again["test/loss"] == pytest.approx(result["first/test/loss"], rel=1e-4)


def test_another_strategy_would_not_read_the_weights_and_is_refused(model: Path, tmp_path: Path) -> None:
    asked = _asked(model, tmp_path, "strategy=ddp", "trainer.devices=1", "callbacks=none", "logger=none")
    cfg = Experiment.read("stdlib_lm", [word for word in asked[3:] if not word.startswith("hydra.")]).cfg
    with pytest.raises(ConfigError, match="another strategy would begin from initial ones; take strategy=hybrid"):
        job.run(cfg)

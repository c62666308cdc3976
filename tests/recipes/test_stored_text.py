"""The language model on token stores: documents kept apart, and the numbers of one process under layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_dist import HybridStrategy
from lightning_dist.data import tokenize
from recipes import targets
from recipes.language_model import CausalLM, Decoder, StoredText
from recipes.optimization import warmup_cosine
from tests.data.tokens.stores import END, train_tokenizer
from tests.support.parity import QUIET, Losses, slow
from tests.support.ranks import run_on_ranks
from tests.support.source import ROOT

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
VOCABULARY = 300


def documents(first: int, count: int) -> list[str]:
    return [
        f"Document {n} says {n * n} to {n % 7} people,\nand then {'again ' * (n % 5)}ends."
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    train_tokenizer(folder / "tokenizer.json", documents(0, 100), VOCABULARY)
    for name, first, count in (("train", 0, 100), ("more", 200, 20), ("val", 300, 15)):
        (folder / f"{name}_texts").mkdir()
        for number, text in enumerate(documents(first, count)):
            (folder / f"{name}_texts" / f"{number:03d}.txt").write_text(text)
        tokenize([folder / f"{name}_texts"], folder / name, folder, workers=1, end_of_document=END)
    return folder


def stored(folder: Path, **options: Any) -> StoredText:
    held_out = {"val": folder / "val", "test": folder / "val"}
    return StoredText(folder / "train", **{**held_out, "vocab_size": VOCABULARY, "sequence_length": 32, **options})


def test_the_decoder_reads_each_document_as_if_alone() -> None:
    torch.manual_seed(0)
    decoder = Decoder(50, **SMALL).eval()
    tokens = torch.randint(50, (2, 12))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    logits = decoder(tokens, positions, ids)
    torch.testing.assert_close(logits[0, :5], decoder(tokens[:1, :5])[0])
    torch.testing.assert_close(logits[0, 5:], decoder(tokens[:1, 5:])[0])
    torch.testing.assert_close(logits[1], decoder(tokens[1:])[0])
    assert not torch.allclose(logits[0, 5:], decoder(tokens)[0, 5:], atol=1e-3)


def test_evaluation_covers_every_target_once_and_its_bytes(stores: Path) -> None:
    data = stored(stores, batch_size=4, documents=True)
    data.setup("fit")
    held_out = data.corpus.tokens["val"]
    batches = list(data.val_dataloader())
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert targets[targets != -100].tolist() == held_out[1:].tolist()
    text = "".join(documents(300, 15))
    first = int(data.corpus.token_bytes[held_out[:1]].sum())  # is context only
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == len(text.encode()) - first
    assert all(batch["document_ids"].shape == batch["inputs"].shape for batch in batches)
    assert data.decode(torch.tensor(data.corpus.encode("A text."))) == "A text."


def test_the_config_makes_it_with_weights(stores: Path) -> None:
    overrides = [
        "recipe=language_model", "model=decoder_tiny", "data=token_store", f"data.vocab_size={VOCABULARY}",
        f"data.train=[{stores}/train,{stores}/more]", f"data.val={stores}/val", "data.weights=[0.5,0.5]",
        "data.sequence_length=16",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), **targets.VERSION_BASE):
        cfg = compose("config", ["hydra.runtime.output_dir=/nowhere", *overrides], return_hydra_config=True)
    data = hydra.utils.instantiate(cfg.data)
    data.setup("fit")
    loader = data.train_dataloader()
    first = list(loader.sampler)[:100]
    assert sum(block >= loader.dataset.blocks_of_stores[0] for block in first) == 50
    with pytest.raises(ValueError, match=f"pass data.vocab_size={VOCABULARY}"):
        stored(stores, vocab_size=20).setup("fit")


def train(layout: str | None, folder: Path, batch_size: int) -> dict[str, Any]:
    L.seed_everything(2, verbose=False)
    world = torch.distributed.get_world_size() if layout else 1
    network = partial(Decoder, VOCABULARY, **SMALL)
    module = CausalLM(network, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05), warmup_cosine)
    losses = Losses()
    trainer = L.Trainer(
        **QUIET,
        max_steps=12,
        devices=world,
        strategy=HybridStrategy(layout) if layout else "auto",
        callbacks=[losses],
        gradient_clip_val=1.0,
        val_check_interval=6,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=stored(folder, batch_size=batch_size, documents=True, eval_batch_size=4))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"losses": losses.losses, **logged}


@pytest.mark.parametrize(("layout", "data_ranks"), [("dp_shard=2", 2), ("tp=2", 1), slow("pp=2", 1)])
def test_training_on_a_store_equals_one_process(stores: Path, layout: str, data_ranks: int) -> None:
    """With documents kept apart: losses of all steps, and what evaluation logs."""
    one = train(None, stores, 4)
    assert len(one["losses"]) == 12
    assert "val/loss_per_byte" in one
    for rank in run_on_ranks(2, train, layout, stores, 4 // data_ranks):
        for name, value in one.items():
            assert rank[name] == pytest.approx(value, rel=1e-5), name

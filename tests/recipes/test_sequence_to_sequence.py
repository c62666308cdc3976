"""Sequence to sequence: pairs as batches, generation, how it is measured, and layouts."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dist import HybridStrategy
from recipes.explain import from_overrides
from recipes.optimization import warmup_cosine
from recipes.pairs import Pair
from recipes.sequence_to_sequence import Baselines, PairData, Seq2Seq
from recipes.sequence_to_sequence.baselines import WordByWord
from recipes.sequence_to_sequence.generation import beam_search
from recipes.sequence_to_sequence.models import transformers_seq2seq
from recipes.sequence_to_sequence.vocabulary import END, PADDING, Vocabulary, train_vocabulary
from tests.recipes.runs import RUNS
from tests.support.parity import QUIET, assert_parity, slow
from tests.support.ranks import run_on_ranks

WORDS = ["one", "two", "three", "four", "five"]
SIZES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0,
}  # fmt: skip


def numbers(count: int, first: int = 0) -> list[Pair]:
    """Digits as words, ``3 1`` as ``three one``; of one to three digits."""
    digits = [[(first + i) * 7 // 5**place % 5 for place in range(1 + i % 3)] for i in range(count)]
    return [Pair(" ".join(str(d + 1) for d in row), " ".join(WORDS[d] for d in row)) for row in digits]


def three_parts() -> dict[str, list[Pair]]:
    return {"train": numbers(160), "val": numbers(21, 300), "test": numbers(22, 400)}


def pair_data(cache: Path, **options: Any) -> PairData:
    lengths = {"max_source_length": 5, "max_target_length": 5}
    known = {"otherwise": three_parts, "tokens": "words", "vocab_size": 16, "cache": cache, **lengths}
    return PairData(**{**known, "batch_size": 8, **options})


def network(family: str = "bart") -> nn.Module:
    if family == "bart":
        return transformers_seq2seq("bart", vocab_size=16, **SIZES)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return transformers_seq2seq("t5", vocab_size=16, **sizes)


def translator(**options: Any) -> Seq2Seq:
    return Seq2Seq(network, partial(torch.optim.AdamW, lr=5e-3), warmup_cosine, max_length=5, **options)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_texts_come_back_from_tokens(kind: Any) -> None:
    pairs = [Pair("the naïve  cat\tsat", "is text"), Pair("a b", "c")]
    if kind == "bpe":
        pairs.append(Pair("<pad> is", "text too </s> "))
    vocabulary = Vocabulary(train_vocabulary(pairs, kind, 300))
    texts = [text for pair in pairs for text in pair]
    for text, tokens in zip(texts, vocabulary.encode(texts), strict=True):
        assert tokens[-1] == END
        assert min(tokens[:-1]) > END
        assert vocabulary.decode([*tokens, 5, 6]) == (text if kind == "bpe" else " ".join(text.split()))


def test_batches_are_padded_and_targets_one_on(tmp_path: Path) -> None:
    data = pair_data(tmp_path, batch_size=3)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    expected = data.vocabulary.encode([pair.target for pair in numbers(3, 300)])
    assert batch["num_targets"].tolist() == [2, 3, 4]
    for row, inputs, tokens in zip(batch["targets"].tolist(), batch["inputs"].tolist(), expected, strict=True):
        assert row == [*tokens, *[-100] * (5 - len(tokens))]
        assert inputs == [PADDING, *tokens[:-1], *[PADDING] * (5 - len(tokens))]
    assert torch.equal(batch["source_mask"].sum(1), batch["num_targets"])
    assert torch.equal(batch["source_mask"].bool(), batch["sources"] != PADDING)
    assert batch["sources"].shape == batch["targets"].shape == (3, 5)
    longest = pair_data(tmp_path, batch_size=3, padding="longest")
    longest.setup("fit")
    assert next(iter(longest.val_dataloader()))["targets"].shape == (3, 4)


def test_references_keep_words_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    tested = [Pair("1", "one"), Pair("1 2", "one  zillion"), Pair("2 1", "zillion one")]
    data = pair_data(tmp_path, otherwise=lambda: {**three_parts(), "test": tested}, eval_batch_size=2)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [text for batch in batches for text in data.references(batch)] == ["one", "one zillion", "zillion one"]
    assert data.decode(batches[1]["targets"]) == ["<unk> one"]


class Echo(nn.Module):
    """Says the target, token by token, unknown ones too: they are the source, one on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, decoder_input_ids: Tensor, input_ids: Tensor | None = None, **given: Any) -> Any:
        tokens = given["encoder_outputs"][0] if input_ids is None else input_ids
        length = decoder_input_ids.shape[1]
        logits = nn.functional.one_hot(tokens[:, :length], 16).float() + self.unused
        return SimpleNamespace(logits=logits, encoder_last_hidden_state=tokens)


def test_an_unknown_word_of_a_reference_is_an_error_whatever_is_said(tmp_path: Path) -> None:
    texts = ["one two", "zillion", "one zillion two"]
    parts = {**three_parts(), "test": [Pair(text, text) for text in texts]}
    data = pair_data(tmp_path, otherwise=lambda: parts)
    module = Seq2Seq(Echo, partial(torch.optim.SGD, lr=0.1), max_length=5)
    found = L.Trainer(**QUIET, devices=1).test(module, datamodule=data, verbose=False)[0]
    assert found["test/word_error_rate"] == pytest.approx(2 / 6)
    assert found["test/exact_match"] == pytest.approx(1 / 3)


def test_long_pairs_are_left_out_of_training_and_refused_in_evaluation(tmp_path: Path) -> None:
    parts = three_parts()
    data = pair_data(tmp_path, otherwise=lambda: {**parts, "train": [*parts["train"], Pair("1 1 1 1 1", "one")]})
    data.prepare_data()
    data.setup("fit")
    assert len(data.parts["train"]) == 160  # type: ignore[arg-type]
    data = pair_data(tmp_path, otherwise=lambda: {**parts, "test": [Pair("1 1 1 1 1", "one")]})
    data.prepare_data()
    with pytest.raises(ValueError, match=r"longer than \(5, 5\) tokens; pass data.max_source_length=6"):
        data.setup("fit")


def test_a_pair_to_evaluate_is_given_once_by_a_limit(tmp_path: Path) -> None:
    data = pair_data(tmp_path, max_eval_pairs=10)
    data.prepare_data()
    data.setup("test")
    assert sum(len(batch["targets"]) for batch in data.test_dataloader()) == 10
    assert list(data.pairs["test"]) == three_parts()["test"][:10]


@pytest.mark.parametrize(
    "model", [[], ["model=transformers_seq2seq", "model.model_type=t5", "+model.d_model=16", "+model.num_layers=1"]]
)
def test_the_config_makes_it_for_a_file_of_pairs(model: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{pair.source} no. {i}\t{pair.target}\n" for i, pair in enumerate(numbers(160))))
    data = ["data=pairs", f"data.path={file}", "data.vocab_size=300", f"data.cache={tmp_path}", "data.batch_size=3"]
    subject = from_overrides(["recipe=sequence_to_sequence", *model, *data, "trainer.devices=1"])
    module: Any = subject.make()
    module.configure_model()
    assert module(subject.first_batch()).shape == (3, 64, 300)
    assert module.max_length == 64


# ---------------------------------------------------------------- generation


class Chain:
    """Logits of the next of 4 tokens from a table by the one before: 0 starts, 3 ends."""

    table = torch.tensor([[0, 0.6, 0.4, 0], [0, 0.35, 0.3, 0.35], [0, 0.05, 0.05, 0.9], [0.25, 0.25, 0.25, 0.25]]).log()

    def __call__(self, rows: Tensor, inputs: Tensor) -> Tensor:
        return self.table[inputs[:, -1]]


def test_beams_find_what_greed_does_not() -> None:
    """The likeliest first token leads to no likely end."""
    greedy = beam_search(Chain(), 2, 3, start=0, end=3)
    found = beam_search(Chain(), 2, 3, start=0, end=3, num_beams=3)
    assert greedy[:, 0].tolist() == [1, 1]
    assert found.tolist() == [[2, 3, 3]] * 2


def test_enough_beams_find_the_best_of_all() -> None:
    """Beside every sequence of 4 tokens that ends where it first says so, of a random table."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).log_softmax(-1)

    def score(tokens: tuple[int, ...]) -> float:
        kept = tokens[: tokens.index(3) + 1] if 3 in tokens else tokens
        path = zip((0, *kept), kept, strict=False)
        return float(sum(table[a, b] for a, b in path)) / len(kept)

    every = torch.cartesian_prod(*[torch.arange(4)] * 3).tolist()
    best = max(score(tuple(tokens)) for tokens in every)
    (found,) = beam_search(lambda rows, inputs: table[inputs[:, -1]], 1, 3, start=0, end=3, num_beams=64).tolist()
    assert score(tuple(found)) == pytest.approx(best)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_generation_is_that_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    module = Seq2Seq(partial(network, family), partial(torch.optim.AdamW, lr=1e-3), max_length=6).eval()
    module.configure_model()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    sources = torch.randint(3, 16, (7, 5))
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 2, 5, 1, 5])[:, None]).long()
    model: Any = module.network
    with torch.no_grad():
        ours = module.generate(sources * mask, mask).tolist()
        theirs = model.generate(sources * mask, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 1:].tolist()
    assert [_ended(tokens) for tokens in ours] == [_ended(tokens) for tokens in theirs]
    assert len({tuple(_ended(tokens)) for tokens in ours}) > 1


def _ended(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens


# ---------------------------------------------------------------- training and measures


def _train_and_test(layout: str, cache: Path, **options: Any) -> dict[str, float]:
    L.seed_everything(1, verbose=False)
    ranks = int(layout.partition("=")[2])
    data_ranks = ranks if layout.startswith("dp") else 1
    data = pair_data(cache, batch_size=8 // data_ranks, eval_batch_size=6)
    module = translator(**options)
    trainer = L.Trainer(**QUIET, devices=ranks, strategy=HybridStrategy(layout), max_epochs=2, callbacks=[Baselines()])
    trainer.fit(module, datamodule=data)
    return {name: float(v) for name, v in trainer.test(module, datamodule=data, verbose=False)[0].items()}


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, _train_and_test("dp_shard=1", cache)


def test_it_learns_and_what_it_generates_is_measured(tested: Any) -> None:
    _, found = tested
    assert found["test/perplexity"] == pytest.approx(math.exp(found["test/loss"]), rel=1e-5)
    assert found["test/word_error_rate"] < found["test/copy/word_error_rate"] == 1.0
    assert 0 < found["test/accuracy"] <= 1
    assert found["test/word_by_word/exact_match"] == 1.0
    assert set(found) >= {"test/bleu", "test/chrf", "test/exact_match"}


@pytest.mark.parametrize("layout", ["dp_shard=2", slow("tp=2")])
def test_generation_under_a_layout_is_that_of_one_process(layout: str, tested: Any) -> None:
    cache, one = tested
    for found in run_on_ranks(2, _train_and_test, layout, cache):
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def _refused(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"pass recipe\.generate=false, and test or predict with the checkpoint"):
        _train_and_test("pp=2", cache)


@pytest.mark.slow
def test_a_pipeline_measures_losses_and_generates_nothing(tested: Any) -> None:
    cache, one = tested
    run_on_ranks(2, _refused, cache)
    for found in run_on_ranks(2, partial(_train_and_test, generate=False), "pp=2", cache):
        assert set(one) - set(found) == {f"test/{name}" for name in ("word_error_rate", "bleu", "chrf", "exact_match")}
        for name, value in found.items():
            assert value == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_a_tensor_layout_trains_as_one_process() -> None:
    assert_parity(RUNS["sequence_to_sequence"], "tp=2", 2)


def test_word_by_word_is_the_likeliest_of_the_book() -> None:
    """IBM Model 1 by its definition, in loops."""
    pairs = [Pair("a b", "x y"), Pair("a", "x"), Pair("b c", "y z"), Pair("c a", "z x"), Pair("b q", "y")]
    words = sorted({w for pair in pairs for w in pair.target.split()} | {""})
    t = {(s, w): 1.0 for s in "abcq" for w in words}
    for _ in range(5):
        counts: Counter[tuple[str, str]] = Counter()
        for pair in pairs:
            sources, targets = pair.source.split(), pair.target.split()
            for w in [*targets, *[""] * (len(sources) - len(targets))]:
                total = sum(t[s, w] for s in sources)
                for s in sources:
                    counts[s, w] += t[s, w] / total
        sums = {s: sum(n for (other, _), n in counts.items() if other == s) for s in "abcq"}
        t = {key: counts[key] / sums[key[0]] for key in t}
    best = {s: max(words, key=lambda w, s=s: t[s, w]) for s in "abcq"}  # type: ignore[misc]
    model = WordByWord(pairs)
    assert model.translate("a b c q") == " ".join(best[s] for s in "abcq" if best[s])
    assert model.translate("never") == "never"

"""Text as tokens: sources, the cached tokenizer, blocks that cover every byte once."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from torch.utils.data import DataLoader

from recipes.language_model import corpus as corpus_module
from recipes.language_model.corpus import (
    Corpus,
    CorpusSettings,
    build_corpus,
    corpus_directory,
    split_documents,
)
from recipes.language_model.data import IGNORED, TextData, TokenBlocks
from recipes.language_model.sources import Document, huggingface, standard_library, text_files

WORDS = ["naïve", "tree", "def f(x):\n", "    return x\n", "日本語", "🙂", "<|endoftext|>", "\t0\r\n"]
SETTINGS = CorpusSettings(vocab_size=300, val_fraction=0.1, test_fraction=0.1)


@pytest.fixture
def documents():
    draw = np.random.default_rng(0)
    return [Document(f"{i}.txt", " ".join(draw.choice(WORDS, 40))) for i in range(30)]


@pytest.fixture
def corpus(documents, tmp_path):
    return Corpus(build_corpus(documents, SETTINGS, tmp_path / "cache"))


def text_data(documents, tmp_path, **arguments):
    arguments = {"vocab_size": 300, "sequence_length": 16, "batch_size": 4, **arguments}
    data = TextData(lambda: documents, val_fraction=0.1, test_fraction=0.1, cache=tmp_path / "cache", **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def test_parts_hold_each_document_once(documents):
    parts = split_documents(documents, SETTINGS)
    assert sorted(d.name for part in parts.values() for d in part) == sorted(d.name for d in documents)
    total = sum(document.num_bytes for document in documents)
    for part in ("val", "test"):
        share = sum(document.num_bytes for document in parts[part]) / total
        assert 0.1 <= share < 0.15


def test_tokens_spell_the_documents_exactly(documents, corpus):
    parts = split_documents(documents, SETTINGS)
    for part, texts in parts.items():
        assert corpus.decode(corpus.tokens[part]) == "".join(document.text for document in texts)
        assert corpus.token_bytes[corpus.tokens[part]].sum() == sum(document.num_bytes for document in texts)


def test_text_that_spells_the_end_of_text_stays_text(corpus):
    assert corpus.decode(corpus.encode("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_corpus_is_made_once_for_the_same_text_and_settings(documents, tmp_path, monkeypatch):
    made = []
    train = corpus_module.train_tokenizer
    monkeypatch.setattr(corpus_module, "train_tokenizer", lambda *a: made.append(a) or train(*a))
    first = build_corpus(documents, SETTINGS, tmp_path)
    assert build_corpus(documents, SETTINGS, tmp_path) == first
    assert len(made) == 1
    changed = [Document(documents[0].name, documents[0].text + "!"), *documents[1:]]
    others = {
        build_corpus(changed, SETTINGS, tmp_path),
        build_corpus(documents, CorpusSettings(301, 0.1, 0.1), tmp_path),
        build_corpus(documents, CorpusSettings(300, 0.2, 0.1), tmp_path),
    }
    assert len(others | {first}) == 4
    assert len(made) == 4


def test_corpus_that_is_interrupted_leaves_nothing_to_read(documents, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module.np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(documents, SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert Corpus(build_corpus(documents, SETTINGS, tmp_path)).tokens["train"].size > 0


def test_corpus_that_another_process_finished_first_is_used(documents, tmp_path, monkeypatch):
    directory = corpus_directory(documents, SETTINGS, tmp_path)
    train = corpus_module.train_tokenizer

    def overtaken(*arguments):
        monkeypatch.setattr(corpus_module, "train_tokenizer", train)
        assert build_corpus(documents, SETTINGS, tmp_path) == directory
        return train(*arguments)

    monkeypatch.setattr(corpus_module, "train_tokenizer", overtaken)
    assert build_corpus(documents, SETTINGS, tmp_path) == directory
    assert list(tmp_path.iterdir()) == [directory]
    assert Corpus(directory).tokens["train"].size > 0


def test_training_blocks_are_the_stream_cut_with_targets_one_on(corpus):
    blocks = TokenBlocks(corpus, "train", 16)
    stream = torch.from_numpy(corpus.tokens["train"].astype(np.int64))
    assert len(blocks) == (len(stream) - 1) // 16
    assert torch.equal(torch.cat([block["inputs"] for block in blocks]), stream[: len(blocks) * 16])
    assert torch.equal(torch.cat([block["targets"] for block in blocks]), stream[1 : len(blocks) * 16 + 1])


@pytest.mark.parametrize("length", [7, 16, 100_000])
def test_evaluation_covers_every_token_and_byte_once(documents, corpus, length):
    blocks = TokenBlocks(corpus, "val", length)
    batches = list(DataLoader(blocks, batch_size=3))
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert targets[targets != IGNORED].tolist() == corpus.tokens["val"][1:].tolist()
    val = split_documents(documents, SETTINGS)["val"]
    assert sum(int(batch["num_bytes"].sum()) for batch in batches) == sum(d.num_bytes for d in val)


def test_unigram_loss_is_the_entropy_of_the_training_counts(corpus):
    tokens, held_out = corpus.tokens["train"][1:].tolist(), corpus.tokens["val"][1:].tolist()
    size = corpus.tokenizer.get_vocab_size()
    expected = -sum(math.log((tokens.count(t) + 1) / (len(tokens) + size)) for t in held_out)
    measured = sum(int(block["unigram_micronats"]) for block in TokenBlocks(corpus, "val", 16)) / 1e6
    assert measured == pytest.approx(expected, rel=1e-7)


def test_prompts_begin_a_document(documents, tmp_path):
    data = text_data(documents, tmp_path, prompts=["tree", "naïve tree"])
    prompts = list(data.predict_dataloader())
    assert [data.decode(prompt[0]) for prompt in prompts] == ["tree", "naïve tree"]
    assert all(int(prompt[0, 0]) == data.corpus.tokenizer.token_to_id("<|endoftext|>") for prompt in prompts)


def test_standard_library_is_the_same_every_time_and_capped():
    first, second = (standard_library(max_bytes=300_000) for _ in range(2))
    assert first == second
    assert 200_000 < sum(document.num_bytes for document in first) <= 300_000
    assert not any("test/" in document.name or "site-packages" in document.name for document in first)


def test_text_files_are_found_in_directories(tmp_path):
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "books/b.txt", "books/c.md"):
        (tmp_path / name).write_bytes(b"caf\xc3\xa9 \xff")
    found = text_files(tmp_path)
    assert sorted(document.name.split("/", 1)[1] for document in found) == ["a.txt", "books/b.txt"]
    assert found[0].text == "café \ufffd"
    assert len(text_files([tmp_path / "a.txt", tmp_path / "books"], pattern="*.md")) == 2


def test_missing_text_names_its_path(tmp_path):
    data = TextData(partial(text_files, tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there; pass a text file"):
        data.prepare_data()


def test_text_without_matching_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file in .* matches '\*\.rst'"):
        text_files(tmp_path, pattern="*.rst")


def test_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        huggingface("some/dataset")


def test_settings_that_leave_no_text_are_refused(documents):
    with pytest.raises(ValueError, match="vocab_size=256"):
        CorpusSettings(256)
    with pytest.raises(ValueError, match="leave text to train on"):
        CorpusSettings(300, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"2 documents .* leave none for train"):
        split_documents(documents[:2], SETTINGS)


def test_text_shorter_than_a_block_is_refused(corpus):
    with pytest.raises(ValueError, match="sequence_length=100000; pass more text or a shorter length"):
        TokenBlocks(corpus, "train", 100_000)


def test_tokenizer_knows_every_byte(corpus):
    assert isinstance(corpus.tokenizer, tokenizers.Tokenizer)
    every = "".join(map(chr, range(256))) + "\U0010ffff"
    assert corpus.decode(corpus.encode(every)) == every


def test_chapters_are_documents_and_those_that_are_named_are_held_out(tmp_path):
    for name in ("emma", "persuasion"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" + "".join(f"CHAPTER {i}\ntext {i}\n" for i in range(9)))
    documents = text_files(tmp_path, chapter="CHAPTER ")
    assert len(documents) == 20
    assert {"".join(d.text for d in documents if d.name == f"{tmp_path.name}/emma.txt {i}") for i in (0, 3)} == {
        "emma\n",
        "CHAPTER 2\ntext 2\n",
    }
    parts = split_documents(documents, CorpusSettings(300, 0.1, 0.5, ("*persuasion.txt *",)))
    assert {d.name for d in parts["test"]} == {f"{tmp_path.name}/persuasion.txt {i}" for i in range(10)}
    assert 1 <= len(parts["val"]) <= 4
    assert len(parts["val"]) + len(parts["train"]) == 10
    with pytest.raises(ValueError, match="no document is named 'sanditon"):
        split_documents(documents, CorpusSettings(300, 0.1, 0.5, ("sanditon*",)))

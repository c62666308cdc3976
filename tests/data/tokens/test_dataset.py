"""Blocks of token stores, and what keeps attention within documents."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from lightning_dist.data import TokenDataset, TokenSampler, TokenStore, document_mask, document_mask_mod
from lightning_dist.data.tokens import DamagedStore
from lightning_dist.data.tokens.format import Shard, StoreIndex, write_index
from tests.data.tokens.stores import numbered, write_store


@pytest.mark.parametrize("shard_tokens", [1, 10, 64, 1000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_blocks_are_the_stream_whatever_the_shards(tmp_path: Path, shard_tokens: int, dtype: str) -> None:
    blocks = TokenDataset(numbered(tmp_path / "store", 500, shard_tokens=shard_tokens, dtype=dtype), 16)
    assert len(blocks) == 499 // 16
    for index in range(len(blocks)):
        block = blocks[index]
        assert block["inputs"].tolist() == list(range(16 * index, 16 * index + 16))
        assert torch.equal(block["targets"], block["inputs"] + 1)
        assert block["inputs"].dtype == torch.int64
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_the_last_block_may_be_filled_up(tmp_path: Path) -> None:
    blocks = TokenDataset(numbered(tmp_path / "store", 40), 16, drop_last=False, documents=True)
    assert len(blocks) == 3
    last = blocks[2]
    assert last["targets"].tolist() == [*range(33, 40)] + [-100] * 9
    assert last["inputs"].tolist() == [*range(32, 39)] + [0] * 9
    assert last["positions"].shape == last["document_ids"].shape == (16,)


@pytest.mark.parametrize("shard_tokens", [50, 100_000])
@pytest.mark.parametrize("document", [1, 3, 40])
def test_positions_and_ids_are_those_of_the_documents(tmp_path: Path, shard_tokens: int, document: int) -> None:
    """With shards of one document and of thousands, which are found by bisection."""
    store = numbered(tmp_path / "store", 8_000, document=document, shard_tokens=shard_tokens)
    starts = set(store.document_starts(0, len(store)).tolist())
    assert len(starts) == store.index.num_documents
    blocks = TokenDataset(store, 32, documents=True)
    for index in [0, 1, 2, 200, len(blocks) - 1, *range(5, len(blocks), 37)]:
        block = blocks[index]
        number, place = 0, -1
        names = "inputs", "document_ids", "positions"
        for token, found, position in zip(*(block[name].tolist() for name in names), strict=True):
            begins = token in starts and token != 32 * index
            number, place = (number + 1, 0) if begins else (number, place + 1)
            assert (found, position) == (number, place), (index, token)


def test_masks_keep_each_document_to_itself(tmp_path: Path) -> None:
    """Attention over a block is that over its documents one by one; and the mask of flex attention is the same."""
    blocks = TokenDataset(numbered(tmp_path / "store", 300, document=5), 24, documents=True)
    ids = torch.stack([blocks[3]["document_ids"], blocks[7]["document_ids"]])
    query, key, value = torch.randn(3, 2, 2, 24, 8, generator=torch.Generator().manual_seed(0)).unbind()
    whole = F.scaled_dot_product_attention(query, key, value, attn_mask=document_mask(ids))
    for row in range(2):
        for document in ids[row].unique():
            inside = (ids[row] == document).nonzero()[:, 0]
            parts = (x[row, :, inside] for x in (query, key, value))
            alone = F.scaled_dot_product_attention(*parts, is_causal=True)
            torch.testing.assert_close(whole[row, :, inside], alone)
    flex = create_mask(document_mask_mod(ids), 2, None, 24, 24, device="cpu")
    assert torch.equal(flex, document_mask(ids))


def test_ten_thousand_shards_are_listed_and_shuffled_without_their_files(tmp_path: Path) -> None:
    """There are none: only the index is."""
    shards = tuple(Shard(f"shard-{number:05d}", 1_000_000 + number, 1000, 0, 0) for number in range(10_000))
    write_index(tmp_path, StoreIndex("uint16", 50_000, {"tokenizer": ""}, shards))
    blocks = TokenDataset(tmp_path, 1024)
    assert len(blocks) == (sum(shard.num_tokens for shard in shards) - 1) // 1024
    order = TokenSampler(blocks, seed=0).order(0)
    some = [order[index] for index in range(0, len(order), len(order) // 1000)]
    assert len(set(some)) == len(some)
    assert max(some) < len(blocks)
    with pytest.raises(FileNotFoundError, match="shard-"):
        blocks[some[0]]


def test_a_store_reads_on_in_another_process_and_beyond_its_open_files(tmp_path: Path) -> None:
    store = numbered(tmp_path / "store", 3000, shard_tokens=20)
    assert len(store.index.shards) > 100
    assert np.array_equal(store[:], np.arange(3000))
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again[17:2500], np.arange(17, 2500))
    assert again[5:5].dtype == store[:].dtype == np.uint16
    with pytest.raises(ValueError, match="in runs"):
        store[::2]
    with pytest.raises(TypeError, match=r"read in runs, not by 0; take \[start:stop\]"):
        store[0]


def test_stores_of_other_tokenizers_do_not_mix(tmp_path: Path) -> None:
    one = numbered(tmp_path / "one", 100, tokenizer="a")
    assert len(TokenDataset([one, numbered(tmp_path / "same", 100, tokenizer="a")], 10)) == 18
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenDataset([one, numbered(tmp_path / "other", 100, tokenizer="b")], 10)


def test_what_is_too_short_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [np.arange(10)])
    assert len(TokenDataset(store, 9)) == 1
    with pytest.raises(ValueError, match="no block of sequence_length=10"):
        TokenDataset(store, 10)


def test_a_store_that_is_not_whole_is_not_opened(tmp_path: Path) -> None:
    store = numbered(tmp_path / "store", 100, shard_tokens=30)
    index = tmp_path / "store" / "index.json"
    with (tmp_path / "store" / f"{store.index.shards[1].name}.tokens").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DamagedStore, match="data check"):
        TokenStore(store.path)[:]
    (tmp_path / "store" / f"{store.index.shards[0].name}.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000\.tokens is missing; run `lightning-dist data check"):
        TokenStore(store.path)[:]
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"num_tokens": 99}))
    with pytest.raises(DamagedStore, match="do not have the tokens"):
        TokenStore(store.path)
    for damaged in (index.read_bytes()[:50], b"\xff\xfe" + index.read_bytes(), b"\0" * 50, b"[]"):
        index.write_bytes(damaged)
        with pytest.raises(DamagedStore, match="can't be read"):
            TokenStore(store.path)
    index.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ValueError, match=r"lightning_dist.tokens 2"):
        TokenStore(store.path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="no whole token store"):
        TokenStore(store.path)

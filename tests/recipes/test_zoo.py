"""The table of networks under layouts says what ``verify`` finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.zoo import table
from recipes.zoo.module import OfZoo
from recipes.zoo.networks import kinds, reads_images
from tests.support.parity import slow
from tests.support.source import PACKAGE

PAGE = PACKAGE / "guides" / "networks.md"
SAMPLE = [
    slow("torch.nn TransformerEncoder", "tp=2"),
    slow("timm resnet10t", "dp_shard=2"),
    slow("torchvision squeezenet1_1", "tp=2"),
    ("transformers t5", "dp_shard=2,tp=2"),
    slow("transformers doge", "tp=2"),
    slow("transformers llama", "pp=2,dp_shard=2"),
]


KNOWN = {
    # 2e-7 of a running mean behind a bias whose gradient is rounding; losses agree to 1e-15
    ("timm mobilevit_xxs", "tp=2"): "differs",
}
"""Cells that are to become something better."""


def _rows(text: str) -> dict[str, dict[str, str]]:
    """The words of a page by network and layout."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return {
        name: {layout.strip("`"): cell.partition(" [")[0] for layout, cell in zip(head[1:], cells, strict=True)}
        for name, *cells in rows
    }


@pytest.mark.parametrize(("name", "layout"), SAMPLE)
def test_a_sample_of_the_table_is_as_it_says(name: str, layout: str) -> None:
    found = table.measured(name, [layout], accelerator="cpu", timeout=200)[layout]
    assert found["word"] == _rows(PAGE.read_text())[name][layout], found["sentence"]


def test_the_table_has_a_hundred_networks_and_says_what_is_wrong_of_few() -> None:
    rows = _rows(PAGE.read_text())
    assert rows.keys() <= kinds().keys()
    assert len(rows) >= 100
    assert all(row.keys() == set(table.LAYOUTS) for row in rows.values())
    good = {"exact", "refused", table.OWN_SAMPLES}
    assert {
        (name, layout): word for name, row in rows.items() for layout, word in row.items() if word not in good
    } == KNOWN


def test_what_was_measured_is_kept_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []
    words = {"tp=2": ("refused", "nothing to divide"), "pp=2": ("differs", "a weight | departs")}

    def measured(name: str, layouts: list[str], *_: object) -> dict[str, dict[str, str]]:
        asked.append((name, tuple(layouts)))
        return {layout: dict(zip(("word", "sentence"), words[layout], strict=True)) for layout in layouts}

    monkeypatch.setattr(table, "measured", measured)
    assert table.main(["torch.nn L*", "torch.nn C*"], ["tp=2"], tmp_path) == 0
    assert table.main(["torch.nn *"], ["tp=2", "pp=2"], tmp_path) == 1
    named = [f"torch.nn {name}" for name in ("MultiLayerPerceptron", "TransformerEncoder", "TransformerDecoder")]
    both, one = ("tp=2", "pp=2"), ("pp=2",)
    known = ["torch.nn LSTM", "torch.nn Conv1d"]
    assert asked == [
        (known[0], ("tp=2",)),
        (known[1], ("tp=2",)),
        *((n, both) for n in named),
        *((n, one) for n in known),
    ]
    text = (tmp_path / "SUPPORT.md").read_text()
    assert _rows(text) == {name: {"tp=2": "refused", "pp=2": "differs"} for name in [*named, *known]}
    assert re.findall(r"^\d+\. .*", text, flags=re.MULTILINE) == ["1. nothing to divide", "2. a weight | departs"]
    assert "`tp=2`: 5 refused." in text
    assert json.loads((tmp_path / "zoo.json").read_text()).keys() == {*named, *known}


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no network of the zoo is named lama; '\*' stands for any letters"):
        table.main(["lama"])


@pytest.mark.parametrize(
    "name", ["transformers vit (images)", "timm convnext_atto", "torch.nn LSTM", "transformers mbart"]
)
def test_networks_get_samples_of_their_kind_and_learn(name: str) -> None:
    module = OfZoo(name)
    batch = next(iter(module.train_dataloader()))
    assert (len(batch) == 2) == reads_images(name)
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(3):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_every_network_trains() -> None:
    for name in kinds():
        module = OfZoo(name)
        module.training_step(next(iter(module.train_dataloader())), 0).backward()
        assert any(p.grad is not None and p.grad.any() for p in module.parameters()), name

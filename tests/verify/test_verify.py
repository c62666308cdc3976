"""``lightning-dist verify``: the same where it is the same, and where it is not, the first module or value."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from lightning_dist.cli import main
from lightning_dist.layout import Layout
from lightning_dist.parallel.pipeline.step_effects import weighted_mean
from lightning_dist.verify import LayoutResult, verify
from lightning_dist.verify.batches import Recorded, interleaved
from lightning_dist.verify.comparison import Comparison, note_batches
from lightning_dist.verify.randomness import switch_off_dropout
from lightning_dist.verify.training import is_refusal
from tests.support.parity import slow
from tests.support.ranks import run_on_ranks
from tests.verify import modules


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """The ranks are forked from the server that the pool has started, which has imported everything."""
    run_on_ranks(1, os.getpid)


check = partial(verify, accelerator="cpu", timeout=120)


def found(make_module: object, layout: str, **options: object) -> LayoutResult:
    return check(make_module, layouts=[layout], **options)[layout]  # type: ignore[arg-type]


def differs(make_module: object, layout: str, **options: object) -> tuple[str, str]:
    """The kind of what departs first, and its name."""
    result = found(make_module, layout, **options)
    assert result.status == "differs", result.sentence
    assert result.departure is not None
    assert result.departure.name in result.sentence
    return result.departure.kind, result.departure.name


# ---------------------------------------------------------------- the same


def test_the_same_numbers_are_told_of_every_layout() -> None:
    layouts = ["dp_shard=2", "dp_replicate=2", "tp=2", "pp=2"]
    whole = check(modules.Reader, layouts=layouts)
    assert {result.layout: result.status for result in whole.results} == dict.fromkeys(layouts, "same")
    assert whole.is_same
    for result in whole.results:
        assert len([name for name in result.values if name.startswith("loss, step")]) == 4
        assert len([name for name in result.values if name.startswith("gradient norm, step")]) == 4
        assert result.differences.keys() >= {"loss", "gradient norm", "weights", "logged values"}
        assert max(result.differences.values()) < 1e-9
    assert whole["dp_shard=2"].values["loss, step 1"] != whole["tp=2"].values["loss, step 1"]
    assert any(note.startswith("dropout was switched off in both (network.blocks.0.dropout.p") for note in whole.notes)


@pytest.mark.parametrize("layout", [slow("dp_shard=2,tp=2"), slow("pp=2,dp_shard=2"), slow("pp=2,tp=2")])
def test_products_of_axes_are_the_same(layout: str) -> None:
    assert found(modules.Reader, layout).status == "same"


def test_random_augmentation_and_several_epochs_are_those_of_the_ranks() -> None:
    assert found(partial(modules.Augments, batch_size=8), "dp_shard=2", steps=10).status == "same"


def test_a_data_module_and_a_loader_are_taken() -> None:
    made = found(modules.Reader, "dp_replicate=2", make_data=modules.SentencesModule, steps=7)
    assert made.status == "same"
    other = found(modules.Reader, "dp_replicate=2", make_data=modules.stream)
    assert other.status == "same", other.sentence


@pytest.mark.parametrize("layout", ["dp_shard=2", slow("dp_replicate=3"), slow("tp=2"), slow("pp=2")])
def test_a_validation_with_an_uneven_last_batch_is_the_same(layout: str) -> None:
    whole = check(modules.Validated, layouts=[layout])
    result = whole[layout]
    assert result.status == "same", result.sentence
    assert whole.validation_batches == 5
    assert result.differences["validation"] < 1e-9
    assert {name for name in result.values if name.startswith("validation")} == {
        "validation, val_loss",
        "validation, val_weight_epoch",
    }


def test_a_validation_can_be_left_out() -> None:
    whole = check(modules.AveragesByHand, layouts=["dp_shard=2"], steps=1, validation_batches=0)
    assert whole["dp_shard=2"].status == "same"
    assert "validation" not in whole["dp_shard=2"].differences
    assert whole.validation_batches == 0


def test_what_is_rounded_by_the_module_is_judged_as_rounding() -> None:
    whole = check(modules.Rounds, layouts=["dp_shard=2"])
    assert whole.is_same
    assert whole.tolerance == 1e-4
    assert any("torch.float32" in note for note in whole.notes)


# ---------------------------------------------------------------- what is planted


def test_a_plan_that_drops_a_bias_is_named_by_its_module() -> None:
    kind, name = differs(modules.without_a_bias, "tp=2")
    assert (kind, name) == ("output", "network.blocks.0.linear2")


@pytest.mark.slow
def test_gradients_that_are_summed_in_place_of_averaged_are_told_as_that() -> None:
    result = found(modules.summed_over_ranks, "dp_shard=2")
    assert result.status == "differs"
    assert result.departure is not None
    assert result.departure.kind == "gradient norm"
    assert "the gradients of all" in result.sentence
    assert "are 2 times those of one process in step 1" in result.sentence


@pytest.mark.slow
def test_a_module_that_sees_its_own_samples_is_named() -> None:
    result = found(partial(modules.Reader, norm=True), "dp_shard=2")
    assert result.departure is not None
    assert (result.departure.kind, result.departure.name) == ("output", "network.batch_norm")
    assert "the buffer network.batch_norm.running_" in result.sentence


@pytest.mark.slow
def test_a_logged_value_that_depends_on_the_batch_is_named() -> None:
    result = found(modules.CountsItsBatch, "dp_shard=2")
    assert result.departure is not None
    assert (result.status, result.departure.kind, result.departure.name) == ("differs", "logged value", "samples")
    assert "is 4, of one process 8" in result.sentence
    assert found(modules.CountsItsBatch, "tp=2").status == "same"


def test_a_value_that_is_averaged_wrongly_over_ranks_in_validation_is_named() -> None:
    assert differs(modules.AveragesByHand, "dp_shard=2", steps=1) == ("validation value", "val_mean")


@pytest.mark.slow
def test_a_validation_batch_that_is_counted_twice_is_told() -> None:
    assert differs(modules.counts_what_is_repeated, "dp_shard=2", steps=1)[0] == "validation value"


def test_a_validation_batch_that_no_rank_gets_is_told() -> None:
    given = [Recorded(validation=[["a", "c", "e"]]), Recorded(validation=[["b", "d", "b"]])]
    assert interleaved(given, [5]) == [["a", "b", "c", "d", "e"]]
    compared = Comparison(bounds={"validation": 1e-9})
    note_batches(compared, [4], [4])
    assert compared.departure is None
    note_batches(compared, [4], [5])
    assert compared.departure is not None
    assert compared.departure.sentence == "the ranks validated on 4 batches, one process on 5"
    assert [wrong.kind for wrong in compared.wrong] == ["validation"]


def test_what_a_data_set_deals_out_itself_is_all_validated() -> None:
    """Five batches on each of two ranks are no repetitions of those of one process."""
    given = [Recorded(validation=[list("abcde")]), Recorded(validation=[list("fghij")])]
    assert sorted(interleaved(given, [5])[0]) == list("abcdefghij")


def test_a_weight_that_a_rank_changes_in_validation_is_named() -> None:
    result = found(modules.ChangesInValidation, "dp_replicate=2", steps=1)
    assert result.departure is not None
    assert (result.departure.kind, result.departure.name) == ("validation value", "network.head.bias")
    assert "the validation changes network.head.bias on rank 1, unlike in one process" in result.sentence


def test_a_running_statistic_is_told_apart_from_weights() -> None:
    result = found(modules.KeepsAStatistic, "dp_shard=2", tolerance=1e-3)
    assert result.departure is not None
    assert (result.departure.kind, result.departure.name) == ("buffer", "followed")
    assert "the buffer followed after the last step is another on rank" in result.sentence
    assert result.differences["weights"] < 1e-3


@pytest.mark.parametrize("layout", ["tp=2", slow("dp_replicate=2"), slow("pp=2")])
def test_a_backward_that_depends_on_the_rank_is_named_by_its_module(layout: str) -> None:
    assert differs(modules.WrongBackward, layout) == ("gradient", "network.blocks.1.norm1")


def test_a_loss_that_depends_on_the_rank_comes_after_the_last_module() -> None:
    kind, name = differs(modules.WeighsByRank, "dp_shard=2")
    assert (kind, name) == ("gradient", "network.head")


def test_random_numbers_of_a_step_are_told() -> None:
    whole = check(modules.Draws, layouts=["tp=2"], steps=1)
    assert any("draw random numbers" in note for note in whole.notes)


# ---------------------------------------------------------------- what can't be


def test_a_layout_that_is_refused_is_no_difference() -> None:
    result = found(partial(modules.Reader, batch_size=1), "pp=2", strategy={"pipeline_cuts": ["network.nothing"]})
    assert result.status == "refused"
    assert "network.nothing" in result.sentence


def test_batches_that_can_not_be_joined_are_refused_in_a_sentence() -> None:
    result = found(modules.Reader, "dp_shard=2", make_data=partial(modules.stream, longer=1))
    assert result.status == "refused"
    assert "can't be joined: a tensor is of shape (2, 3), (2, 4)" in result.sentence


def test_a_rank_that_fails_ends_all_with_its_traceback() -> None:
    result = found(modules.BreaksOnRank, "dp_shard=2")
    assert result.status == "failed"
    assert "rank 1 raised KeyError" in result.sentence
    assert result.trace.count("\nKeyError: 'of the user'") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_with_where_it_stands() -> None:
    result = found(modules.Hangs, "tp=2", timeout=20)
    assert result.status == "failed"
    assert "gave no answer in 20 s" in result.sentence


def test_a_module_that_does_not_train_is_the_users_mistake() -> None:
    with pytest.raises(ValueError, match=r"does not train in one process.*KeyError: 'nothing'.*modules.py"):
        check(modules.Breaks, layouts=["tp=2"])


def test_a_module_that_does_not_validate_is_the_users_mistake() -> None:
    told = r"does not validate in one process.*KeyError: 'labels'.*modules.py.*--validation-batches 0"
    with pytest.raises(ValueError, match=told):
        check(modules.NeedsLabels, layouts=["tp=2"], steps=1)


def test_steps_without_gradients_are_no_agreement() -> None:
    with pytest.raises(ValueError, match="no step of the module in one process has gradients"):
        check(modules.Idle, layouts=["tp=2"], steps=1)


def test_what_can_not_be_handed_to_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be handed to other processes"):
        check(lambda: modules.Reader(), layouts=["tp=2"])


# ---------------------------------------------------------------- the command

READER = "tests.verify.modules:Reader"


def test_the_command_tells_all_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    what = [READER, "norm=True", "--layouts", "dp_replicate=2", "tp=2", "--accelerator", "cpu"]
    data = ["--data", "tests.verify.modules:SentencesModule", "batch_size=2"]
    assert main(["verify", *what, *data, "--steps", "2", "--json", str(file)]) == 1
    told = json.loads(file.read_text())
    assert {result["layout"]: result["status"] for result in told["results"]} == {
        "dp_replicate=2": "differs",
        "tp=2": "same",
    }
    assert told["results"][0]["departure"]["name"] == "network.batch_norm"
    shown = capsys.readouterr().out
    assert "dp_replicate=2: differs: the output of network.batch_norm (BatchNorm1d) departs first" in shown
    assert "the batches of 2 data ranks, joined" in shown


def test_a_refusal_is_a_failure_if_strict() -> None:
    what = ["verify", READER, "--layouts", "pp=2", "--accelerator", "cpu", "--strategy", "pipeline_cuts=[nothing]"]
    assert main(what) == 0
    assert main([*what, "--strict"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([READER, "--layouts", "tp"], "tp"),
        ([READER, "--layouts", "dp_shard=-1"], "give every axis a degree"),
        ([READER, "--layouts", "tp=2", "--steps", "0"], "steps is 0"),
        ([READER, "--layouts", "tp=2", "--validation-batches", "-1"], "validation_batches is -1"),
        ([READER, "--layouts", "tp=2", "--timeout", "0"], "--timeout is 0"),
        (["tests.verify.modules:Nothing", "--layouts", "tp=2"], "can't be imported"),
        ([READER, "depth=2", "--layouts", "tp=2"], "give its arguments as name=value"),
        (["tests.verify.modules:plain", "--layouts", "tp=2"], "a LightningModule is what can be verified"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_recipe_is_verified_by_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    what = ["verify", "experiment=digits_vit", "data.batch_size=4", "--layouts", "dp_shard=2", "--accelerator", "cpu"]
    assert main([*what, "--steps", "2", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["results"][0]["status"] == "same"


def test_every_kind_of_dropping_is_switched_off() -> None:
    layers = nn.Sequential(nn.Dropout(0.1), StochasticDepth(0.2, "row"), DropPath(0.3), nn.Linear(3, 3))
    assert switch_off_dropout(layers) == {"0.p", "1.p", "2.drop_prob"}
    x = torch.randn(64, 3)
    assert torch.equal(layers[2](layers[1](layers[0](x))), x)


def test_only_what_this_package_raises_is_a_refusal() -> None:
    with pytest.raises(ValueError, match="dp") as refused:
        Layout.parse("dp=3")
    with pytest.raises(RuntimeError) as failed:  # by torch, called in a line of this package
        weighted_mean([torch.ones(2), torch.ones(3)], [1.0, 1.0])
    assert is_refusal(refused.value)
    assert not is_refusal(failed.value)

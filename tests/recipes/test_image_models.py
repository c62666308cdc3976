"""Networks of any number of channels and classes, and the module that trains them."""

from functools import partial

import lightning.pytorch as L
import pytest
import torch

from recipes.image_classification import Digits, ImageClassifier
from recipes.image_classification.models import timm_classifier, torchvision_classifier, vision_transformer
from recipes.optimization import warmup_cosine


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(vision_transformer, 8), id="vit"),
        pytest.param(partial(torchvision_classifier, "resnet18", 8), id="resnet18"),
        pytest.param(partial(torchvision_classifier, "mobilenet_v3_small", 32), id="mobilenet"),
        pytest.param(partial(timm_classifier, "test_vit", 32), id="timm-vit"),
        pytest.param(partial(timm_classifier, "test_resnet", 32), id="timm-resnet"),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_any_classifier_takes_any_channels_and_classes(make, in_channels):
    size = make.args[-1]
    network = make(in_channels=in_channels, num_classes=7).eval()
    assert network(torch.randn(2, in_channels, size, size)).shape == (2, 7)


def test_torchvision_transformers_take_the_size_of_the_images():
    with torch.device("meta"):
        network = torchvision_classifier("vit_b_16", 32, 1, 7)
    assert network.image_size == 32
    assert network.conv_proj.in_channels == 1


@pytest.mark.parametrize(("stem", "size", "seen"), [("small", 28, 28), ("auto", 8, 8), ("auto", 28, 7)])
def test_small_stem_keeps_the_size_of_the_image(stem, size, seen):
    network = torchvision_classifier("resnet18", size, 1, 10, stem=stem).eval()
    shapes = []
    network.layer1.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[-1]))
    network(torch.randn(1, 1, size, size))
    assert shapes == [seen]


def test_unknown_networks_name_the_closest():
    with pytest.raises(ValueError, match=r"no classifier 'resnet19'; the closest are .*resnet18"):
        torchvision_classifier("resnet19", 8, 1, 10)
    with pytest.raises(ValueError, match=r"timm has no model 'convnext_ato'; the closest are .*convnext_atto"):
        timm_classifier("convnext_ato", 32, 3, 10)


def test_stem_of_a_network_without_one_is_refused():
    with pytest.raises(ValueError, match="mobilenet_v3_small is none"):
        torchvision_classifier("mobilenet_v3_small", 32, 1, 10, stem="small")


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch_size=3 does not divide image_size=8"):
        vision_transformer(8, 1, 10, patch_size=3)
    with pytest.raises(ValueError, match="num_heads=5 does not divide width=64"):
        vision_transformer(8, 1, 10, num_heads=5)


def classifier(**arguments):
    return ImageClassifier(
        partial(vision_transformer, 8, 1, 10, width=32, depth=1),
        partial(torch.optim.AdamW, lr=5e-3),
        partial(warmup_cosine, warmup=0.1),
        num_classes=10,
        **arguments,
    )


def trainer(**arguments):
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_classifier_learns_the_digits():
    L.seed_everything(0, verbose=False)
    module, data = classifier(), Digits(batch_size=32)
    run = trainer(max_epochs=10)
    run.fit(module, datamodule=data)
    [result] = run.test(module, datamodule=data, verbose=False)
    assert result["test/accuracy"] > 0.6
    probabilities = torch.cat(run.predict(module, datamodule=data))
    assert probabilities.shape == (360, 10)
    hits = (probabilities.argmax(1) == data.parts["test"].labels).float().mean()
    assert float(hits) == pytest.approx(result["test/accuracy"])


def test_model_is_built_once_over_several_runs():
    module, data = classifier(), Digits()
    run = trainer(max_steps=1, limit_val_batches=1)
    run.fit(module, datamodule=data)
    network = module.model
    run.validate(module, datamodule=data, verbose=False)
    assert module.model is network


def test_schedule_runs_by_step_over_the_whole_run():
    module = classifier()
    run = trainer(max_steps=10, limit_val_batches=0)
    run.fit(module, datamodule=Digits())
    assert run.lr_scheduler_configs[0].interval == "step"
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.01, 0.0]


def test_label_smoothing_is_for_training_only():
    torch.manual_seed(0)
    batch = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    losses = {}
    for smoothing in (0.0, 0.5):
        module = classifier(label_smoothing=smoothing)
        torch.manual_seed(1)
        module.configure_model()
        module.log = lambda name, value, smoothing=smoothing, **_: losses.update({(name, smoothing): value})
        module.training_step(batch, 0)
        module.validation_step(batch, 0)
    assert losses["train/loss", 0.0] != losses["train/loss", 0.5]
    assert losses["val/loss", 0.0] == losses["val/loss", 0.5]

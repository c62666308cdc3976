"""Every private name of another project is in lightning_dist/compat, registered, and in the installed release."""

import importlib

import pytest

from lightning_dist.compat import names

for project in (
    "distributed",
    "elastic",
    "fabric",
    "lightning",
    "litdata",
    "operators",
    "torch",
    "torchmetrics",
    "transformers",
):
    importlib.import_module(f"lightning_dist.compat.{project}")


@pytest.mark.parametrize(
    "name", sorted(names.REGISTER, key=lambda name: (name.path, name.user)), ids=lambda name: name.path
)
def test_the_installed_release_has_it(name: names.PrivateName) -> None:
    assert name.is_there(), str(name)


def test_a_name_that_is_gone_is_said_in_a_sentence() -> None:
    gone = names.PrivateName("torch.Tensor._no_such_name", "Shows what is there.", "nobody")
    assert not gone.is_there()
    assert str(gone) == "torch.Tensor._no_such_name (seen in 2.14.1) is gone; nobody used it: Shows what is there."


def test_what_instances_set_is_seen() -> None:
    assert names.PrivateName("lightning.pytorch.Trainer._data_connector", "", "").is_there()
    assert names.PrivateName("torch.nn.Module._parameters", "", "").is_there()
    assert names.PrivateName("torch.distributed.tensor.DTensor._local_tensor", "", "").is_there()
    assert not names.PrivateName("torch.nn.Module._no_such_name", "", "").is_there()

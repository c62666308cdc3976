"""The medicine recipes: the data that come with scikit-learn, MedMNIST's files, what a diagnosis is measured by."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.metrics import accuracy_score, brier_score_loss, recall_score, roc_auc_score, roc_curve

from recipes.medicine import MedMNIST, ResNet3D, ScanClassifier, breast_cancer, class_metrics, diagnosis_metrics
from recipes.tables import TableData
from recipes.tables.baselines import baselines
from tests.support.source import ROOT


def file_of_scans(path: Path, shape: tuple[int, ...], **changes: Any) -> Path:
    """As MedMNIST writes them: three classes that the mean of a scan tells."""
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 48), ("val", 12), ("test", 21)):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 3
        noise = draw.integers(0, 60, (count, *shape))
        arrays[f"{part}_images"] = (noise + 90 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez_compressed(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


@pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((8, 8, 3), 3), ((8, 8, 8), 1)])
def test_a_file_of_medmnist_is_read(shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    path = file_of_scans(tmp_path / "some.npz", shape)
    data = MedMNIST(path=path, num_classes=3, in_channels=channels, image_size=8, batch_size=48)
    data.prepare_data()
    data.setup("fit")
    scans, labels = next(iter(data.train_dataloader()))
    assert scans.shape == (48, channels, *shape[: 3 if channels == 1 else 2])
    assert labels.shape == (48,)
    assert float(scans.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scans.std()) == pytest.approx(1, abs=1e-3)
    scan, label = data.parts["test"][4]
    stored = np.load(path)["test_images"][4]
    stored = stored.transpose(2, 0, 1) if channels == 3 else stored[None]
    np.testing.assert_allclose(scan * data.parts["test"].std + data.parts["test"].mean, stored, atol=1e-4)  # type: ignore[attr-defined]
    assert label == 1


def test_scans_are_mirrored_in_training_only(tmp_path: Path) -> None:
    path = file_of_scans(tmp_path / "some.npz", (8, 8, 8))
    data = MedMNIST(path=path, num_classes=3, image_size=8, flip=True)
    data.setup("fit")
    plain = MedMNIST(path=path, num_classes=3, image_size=8)
    plain.setup("fit")
    torch.manual_seed(0)
    seen = [data.parts["train"][0][0] for _ in range(20)]
    kept = plain.parts["train"][0][0]
    is_kept = [torch.equal(scan, kept) for scan in seen]
    assert 0 < sum(is_kept) < 20
    assert all(torch.equal(scan, kept if same else kept.flip(-1)) for scan, same in zip(seen, is_kept, strict=True))
    assert all(torch.equal(data.parts["val"][0][0], plain.parts["val"][0][0]) for _ in range(8))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"val_labels": None}, {}, "has no val_labels; it has train_images"),
        ({"test_labels": np.ones((21, 14), int)}, {}, "has 14 labels a scan; this recipe tells one class each"),
        ({}, {"num_classes": 2}, "has the labels 0, 1, 2, and data.num_classes=2; pass data.num_classes=3"),
        ({}, {"num_classes": 4}, "has the labels 0, 1, 2, and data.num_classes=4; pass data.num_classes=3"),
        ({"val_labels": np.full((12, 1), -1)}, {}, "has the labels -1, 0, 1, 2, and data.num_classes=3; number the"),
        ({"val_labels": np.full((12, 1), 5)}, {"num_classes": 6}, "has the labels 0, 1, 2, 5, and .*; number the"),
        ({}, {"in_channels": 3}, r"has scans of \(8, 8, 8\), which are not data.in_channels=3"),
        ({}, {"image_size": 28}, "which are not data.in_channels=1 and data.image_size=28"),
    ],
)
def test_a_file_that_is_not_as_told_is_told(
    changes: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = file_of_scans(tmp_path / "some.npz", (8, 8, 8), **changes)
    with pytest.raises(ValueError, match=message):
        MedMNIST(path=path, **{"num_classes": 3, "image_size": 8, **arguments}).setup("fit")


def test_a_file_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"pass it as data\.path="):
        MedMNIST(path=tmp_path / "none.npz", num_classes=2).prepare_data()
    monkeypatch.setitem(__import__("sys").modules, "medmnist", None)
    monkeypatch.setattr("recipes.medicine.data.DOWNLOADS", tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install medmnist"):
        MedMNIST("nodulemnist3d", num_classes=2).prepare_data()
    with pytest.raises(ValueError, match="needs a name or a file"):
        MedMNIST(num_classes=2)


def test_a_network_learns_volumes_and_logs_each_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = file_of_scans(tmp_path / "some.npz", (8, 8, 8))
    data = MedMNIST(path=path, num_classes=3, image_size=8, batch_size=16)
    network = partial(ResNet3D, 1, 3, widths=(8, 16))
    module = ScanClassifier(network, lambda groups: torch.optim.AdamW(groups, 1e-2), num_classes=3)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=4, enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/accuracy"] > 0.9
    assert {f"test/{name}/{index}" for name in ("auc", "accuracy") for index in range(3)} <= tested.keys()


def test_classes_are_measured_as_others_measure_them() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (301,), generator=generator)
    probabilities = (torch.randn(301, 3, generator=generator) + torch.eye(3)[labels]).softmax(1)
    metrics = class_metrics(3)
    for piece, of_piece in zip(probabilities.split(50), labels.split(50), strict=True):
        for metric in metrics.values():
            metric.update(piece, of_piece)
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    told = probabilities.argmax(1)
    expected = {
        "accuracy": accuracy_score(labels, told),
        "auc": roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
    }
    for index, recall in enumerate(recall_score(labels, told, average=None)):
        expected[f"accuracy/{index}"] = recall
        expected[f"auc/{index}"] = roc_auc_score(labels == index, probabilities[:, index])
    assert found == pytest.approx(expected, rel=1e-5)


def test_images_are_no_volumes() -> None:
    with pytest.raises(ValueError, match=r"these scans are \(2, 1, 8, 8\); pass model=resnet18 for images"):
        ResNet3D(1, 3, widths=(8, 16))(torch.zeros(2, 1, 8, 8))


def test_a_class_that_a_part_lacks_has_no_say_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 3])[torch.randint(3, (301,), generator=generator)]
    probabilities = (torch.randn(301, 4, generator=generator) + torch.eye(4)[labels]).softmax(1)
    auc, alone = class_metrics(4)["auc"], class_metrics(4)["auc"]
    for piece, of_piece in zip(probabilities.split(50), labels.split(50), strict=True):
        auc.update(piece, of_piece)
    expected = np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in (0, 1, 3)])
    assert float(auc.compute()) == pytest.approx(expected, rel=1e-5)
    alone.update(probabilities[:9], torch.ones(9, dtype=torch.int64))
    assert alone.compute().isnan()


def test_a_diagnosis_is_measured_as_others_measure_it() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (301,), generator=generator)
    probabilities = (0.4 * labels + 0.6 * torch.rand(301, generator=generator)).clamp(0, 1)
    found = {}
    for name, metric in diagnosis_metrics(0.9).items():
        metric.update(probabilities, labels.float() if name == "brier" else labels)
        found[name] = float(metric.compute())
    false_positives, true_positives, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    told = probabilities > 0.5
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(labels, probabilities),
            "accuracy": accuracy_score(labels, told),
            "sensitivity": recall_score(labels, told),
            "specificity": recall_score(labels, told, pos_label=0),
            "brier": brier_score_loss(labels, probabilities),
            "sensitivity_at_specificity": true_positives[1 - false_positives >= 0.9].max(),
        },
        rel=1e-5,
    )


def test_tumours_are_in_parts_and_baselines_foretell_them() -> None:
    conf: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/data/breast_cancer.yaml"))
    arguments = {name: value for name, value in conf.items() if name not in ("_target_", "otherwise")}
    data = TableData(**arguments, otherwise=breast_cancer)
    data.setup("fit")
    parts: Any = data.parts
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == 569
    assert sum(float(part.labels.sum()) for part in parts.values()) == 212
    assert (parts["test"].categories.shape, parts["test"].categories.dtype) == ((sizes[2], 0), torch.int64)
    for probabilities in baselines([parts["train"], parts["val"]], parts["test"]).values():
        assert roc_auc_score(parts["test"].labels, probabilities) > 0.97

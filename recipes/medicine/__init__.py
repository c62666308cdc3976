"""Medicine: whether a tumour is malignant by measurements of its cells, and MedMNIST's images in two and three dims."""

from recipes.medicine.cells import breast_cancer
from recipes.medicine.data import MedMNIST
from recipes.medicine.metrics import class_metrics, diagnosis_metrics
from recipes.medicine.module import ScanClassifier
from recipes.medicine.resnet3d import ResNet3D

__all__ = ["MedMNIST", "ResNet3D", "ScanClassifier", "breast_cancer", "class_metrics", "diagnosis_metrics"]

"""Image classification: any torchvision or timm network, on digits, Fashion-MNIST or a folder of images."""

from recipes.image_classification.baselines import PixelBaselines
from recipes.image_classification.data import Digits, FashionMNIST, ImageFolders
from recipes.image_classification.module import ImageClassifier
from recipes.image_classification.shards import ImageShards

__all__ = ["Digits", "FashionMNIST", "ImageClassifier", "ImageFolders", "ImageShards", "PixelBaselines"]

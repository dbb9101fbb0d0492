"""Networks to take apart: factories, and trained ones that ship with the package."""

from .highway import Highway, highway
from .resnet import ResNet, resnet
from .vgg import VGG, vgg
from .zoo import build, card, load, names, pack

__all__ = ["VGG", "Highway", "ResNet", "build", "card", "highway", "load", "names", "pack", "resnet", "vgg"]

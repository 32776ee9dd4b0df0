"""The places that depend on more than the documented interfaces of timm and PyTorch."""

import torch.nn as nn

# timm 1.0.31 does not export it, and its own models import it from here.
from timm.models._features import feature_take_indices

__all__ = ['change_class', 'feature_take_indices']


def change_class(model: nn.Module, cls: type[nn.Module]) -> None:
    """Makes a model an instance of a subclass of its class.

    timm 1.0.31 creates a model by its name and always with its own class. Assigning ``__class__`` keeps the object, to
    which hooks may refer; ``torch.nn.utils.parametrize`` does the same in PyTorch 2.11.
    """
    model.__class__ = cls

"""Which backbone a timm model has, by its shape: a chain with the model's own readout, or stages."""

from __future__ import annotations

from torch import nn

from offramp.backbone import Backbone
from offramp.errors import UnsupportedModel
from offramp_vision.backbones.staged import StagedBackbone
from offramp_vision.backbones.vit import VitBackbone


def backbone_of(model: nn.Module) -> Backbone:
    """Return the backbone of a timm classifier; raises `UnsupportedModel` with what is supported.

    A chain of tokens whose classifier reads the last state through norm and pooling alone lets heads start from the
    model's own readout; every other model has exits with readouts of their own.
    """
    try:
        return VitBackbone(model)
    except UnsupportedModel:
        return StagedBackbone(model)

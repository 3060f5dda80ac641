"""Which positions hold text: by ids, padding, positions and the cache of earlier passes, as models are called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saekit.positions import call_of, text_positions

IDS = torch.tensor([[5, 6, 7, 8], [1, 6, 1, 8]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


class Cache(SimpleNamespace):
    def get_seq_length(self):
        return self.length


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"input_ids": IDS}, [[0, 1, 1, 1], [0, 1, 0, 1]]),  # BOS, id 1, is not text wherever it is
        ({"inputs_embeds": torch.zeros(2, 4, 3)}, [[0, 1, 1, 1], [0, 1, 1, 1]]),
        ({"input_ids": IDS, "attention_mask": LEFT}, [[0, 1, 1, 1], [0, 0, 0, 1]]),
        ({"input_ids": IDS, "attention_mask": LEFT.flip(1)}, [[0, 1, 1, 1], [0, 1, 0, 0]]),  # padding at the end
        ({"input_ids": IDS, "past_key_values": Cache(length=0)}, [[0, 1, 1, 1], [0, 1, 0, 1]]),
        ({"input_ids": IDS, "past_key_values": Cache(length=3)}, [[1, 1, 1, 1], [0, 1, 0, 1]]),
        ({"input_ids": IDS, "past_key_values": ((torch.zeros(2, 1, 3, 4),) * 2,)}, [[1, 1, 1, 1], [0, 1, 0, 1]]),
        ({"input_ids": IDS, "cache_position": torch.arange(3, 7)}, [[1, 1, 1, 1], [0, 1, 0, 1]]),
        ({"input_ids": IDS, "cache_params": SimpleNamespace(has_previous_state=True)}, [[1, 1, 1, 1], [0, 1, 0, 1]]),
        ({"input_ids": IDS, "cache_params": SimpleNamespace(has_previous_state=False)}, [[0, 1, 1, 1], [0, 1, 0, 1]]),
        (  # the second row's context begins in this pass
            {
                "input_ids": IDS + 1,
                "past_key_values": Cache(length=3),
                "attention_mask": torch.tensor([[1] * 7, [0, 0, 0, 0, 1, 1, 1]]),
            },
            [[1, 1, 1, 1], [0, 0, 1, 1]],
        ),
        (  # a mask of this pass alone
            {"input_ids": IDS + 1, "past_key_values": Cache(length=3), "attention_mask": torch.ones(2, 4)},
            [[1, 1, 1, 1], [1, 1, 1, 1]],
        ),
        (  # two contexts in one row
            {"input_ids": IDS + 1, "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])},
            [[0, 1, 0, 1], [0, 1, 1, 1]],
        ),
        ({"input_ids": IDS + 1, "attention_mask": torch.zeros(2, 1, 4, 4)}, [[0, 1, 1, 1], [0, 1, 1, 1]]),
        ({}, None),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, None),
    ],
)
def test_text_positions(call, expected):
    found = text_positions(call, bos=1)
    assert (None if found is None else found.int().tolist()) == expected


def test_arguments_are_known_by_their_places():
    class Model(torch.nn.Module):
        def forward(self, tokens, attention_mask=None, **others):
            return tokens

    assert call_of(Model(), (1, 2), {"past_key_values": 3}) == {
        "tokens": 1,
        "input_ids": 1,
        "attention_mask": 2,
        "past_key_values": 3,
    }
    assert call_of(Model(), (), {"input_ids": 1}) == {"input_ids": 1}

"""A lean module predicts what it always did, and multiplies once where it multiplied sample by sample."""

import torch
from torch import nn
from torch.profiler import profile

from codistill.exchange.checkpoint.lean import lean


class Transposing(nn.Module):
    """Turns its features round before the output layer, as fairseq's decoders do."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(8, 50, bias=False)

    def forward(self, features):
        return self.output(features.transpose(0, 1))


def operators(module, inputs):
    with profile() as seen, torch.no_grad():
        module(inputs)
    return {event.key for event in seen.key_averages()}


def test_an_input_that_does_not_lie_in_order_is_multiplied_as_one_matrix():
    features, plain = torch.randn(5, 3, 8), Transposing().eval().requires_grad_(False)
    wanted = plain(features)
    assert "aten::bmm" in operators(plain, features)
    made = lean(plain)
    assert "aten::bmm" not in operators(made, features)
    torch.testing.assert_close(made(features), wanted)
    assert set(made.state_dict()) == {"output.weight"}


def test_torchs_own_transformer_layers_keep_their_fast_path():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    made = lean(nn.Sequential(layers, nn.Linear(8, 4)).eval().requires_grad_(False))
    assert "aten::_transformer_encoder_layer_fwd" in operators(made, torch.randn(2, 3, 8))

"Networks of the CRES wing: shapes, gradients, heads, losses."
import pytest
import torch

from deadlayer_cres.cres.model import ENCODERS, HEADS, EncoderConfig, ModelConfig, Reconstructor


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_shapes(kind, head):
    net = Reconstructor(ModelConfig([EncoderConfig(kind, 8, 1)], head=head), [2], ("energy_eV", "pitch_angle_deg"))
    net.scale.fit([[0.0, 1.0], [2.0, 3.0]])
    assert net.read(net(torch.randn(3, 2, 70))).mean.shape == (3, 2)

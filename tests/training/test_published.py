"""The sizes of published models: as many weights as they have, and plugins that work around random ones."""

import pytest
import torch

from condrl.training.published import made_on, make_part, published, weights_gb

VAES = {"sd15": 83_653_863, "sdxl": 83_653_863, "sd3.5-medium": 83_819_683, "flux": 83_819_683}


def weights_of(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", VAES)
def test_they_have_the_published_number_of_weights(name):
    """Of the network and of the VAE, counted without making them."""
    size = published()[name]
    with torch.device("meta"):
        assert weights_of(make_part(size.network)) == size.weights
        assert weights_of(make_part(size.vae, "AutoencoderKL")) == VAES[name]
    assert set(published()) == set(VAES)
    assert weights_gb(size, torch.bfloat16) == 2 * size.weights / 1e9


def test_a_part_is_made_where_and_as_it_is_asked_for():
    before = torch.get_default_dtype()
    with made_on(torch.device("meta"), torch.float16):
        layer = torch.nn.Linear(2, 3)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float16)
    with pytest.raises(ZeroDivisionError), made_on(torch.device("meta"), torch.float16):
        1 / 0  # noqa: B018
    assert torch.get_default_dtype() == before
    assert torch.nn.Linear(2, 3).weight.device.type == "cpu"

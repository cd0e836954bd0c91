from pathlib import Path

import pytest
import torch
from helpers import tiny_pipeline

from condrl.models.stable_diffusion import StableDiffusion

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A diffusers folder with an epsilon-predicting pipeline of random weights."""
    return tiny_pipeline(tmp_path_factory.mktemp("epsilon"))


@pytest.fixture(scope="session")
def v_pipeline(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("v"), "v_prediction")


@pytest.fixture
def model(pipeline) -> StableDiffusion:
    return StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2)

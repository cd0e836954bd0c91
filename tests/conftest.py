import gc
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script, tiny_pipeline

from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.registry import REGISTRIES

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start: two of them share two cores
os.environ.setdefault("GPU_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # test_gpu.py's alone
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers of all other tests are a CPU's


@pytest.fixture(autouse=True, scope="module")
def collect_only_what_tests_leave():
    """What is there by now is not looked through again whenever garbage is collected: each run does so as it ends."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_random_numbers(request):
    """A test's random numbers are its own, whichever tests came before it in its process."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def forget_plugins_of_other_folders():
    """What a test registered from files outside the repository is forgotten after it."""
    yield
    for registry in REGISTRIES.values():
        for name, plugin in list(registry.plugins.items()):
            source = Path(plugin.source)
            if source.suffix == ".py" and ROOT not in source.resolve().parents and "site-packages" not in source.parts:
                del registry.plugins[name]
                for module in [
                    m for m, loaded in sys.modules.items() if getattr(loaded, "__file__", None) == str(source)
                ]:
                    del sys.modules[module]


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


@pytest.fixture
def research() -> Any:
    """scripts/research/benchmark.py, loaded anew."""
    return load_script("benchmark")

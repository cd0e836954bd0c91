"""The measurements of scripts/research/benchmark.py that no table of the documentation keeps running."""

from helpers import load_script

from condrl.loading import load_config


def test_bare_calls_are_of_the_network_as_the_model_calls_it(tmp_path):
    benchmark = load_script("benchmark")
    trainer = benchmark.quickstart_trainer(load_config([str(benchmark.QUICKSTART), f"run.dir={tmp_path}"]), prompts=1)
    sizes = []
    trainer.policy.model.module.register_forward_hook(lambda module, given, found: sizes.append(len(found.sample)))
    for train in (False, True):
        benchmark.bare(trainer, 3, 2, train)
    assert sizes == [2, 1, 2, 1]

"""The chain: schedules, the affine step, what a model is, policies and their roll-outs. It knows no config."""

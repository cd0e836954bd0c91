"""Writes a package `bitsandbytes` whose AdamW8bit keeps its state as the real one (0.50) does, and records its making.

Its arithmetic is a plain one of its own: what tests of a run need of it is that its state matters and can be kept.
"""

from pathlib import Path

CODE = """
import torch

QUANTISED = "__bnb_optimizer_quant_state__"
KEPT = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
MADE = []


class AdamW8bit(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        MADE.append([dict(group) for group in self.param_groups])
        self.maps = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)  # shared by all weights

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if p.device.type != DEVICE:
                    raise NotImplementedError("no kernel for " + p.device.type)
                self.update(p, group)

    def update(self, p, group):
        state, size = self.state[p], 4096
        if not state:
            state["step"] = 0
            kind = torch.float32 if p.numel() < size else torch.uint8
            state["state1"], state["state2"] = (torch.zeros_like(p, dtype=kind) for _ in range(2))
            if kind == torch.uint8:
                state["state1"] += 128
                state["qmap1"], state["qmap2"] = self.maps
                state["absmax1"], state["absmax2"] = torch.zeros(1), torch.zeros(1)
        state["step"] += 1
        moments = []
        for n, beta, value in ((1, group["betas"][0], p.grad), (2, group["betas"][1], p.grad.square())):
            moment = self.read(state, n) * beta + value * (1 - beta)
            self.write(state, n, moment)
            moments.append(moment / (1 - beta ** state["step"]))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * moments[0] / (moments[1].sqrt() + group["eps"]))

    def read(self, state, n):
        kept = state[f"state{n}"]
        return kept if kept.is_floating_point() else state[f"qmap{n}"][kept.long()] * state[f"absmax{n}"]

    def write(self, state, n, moment):
        if state[f"state{n}"].is_floating_point():
            state[f"state{n}"] = moment
            return
        state[f"absmax{n}"] = moment.abs().max().reshape(1).clamp(min=1e-30)
        codes = torch.bucketize(moment / state[f"absmax{n}"], state[f"qmap{n}"]).clamp(max=255)
        state[f"state{n}"] = codes.to(torch.uint8)

    def state_dict(self):
        whole = super().state_dict()
        for key, state in whole["state"].items():
            rest = {name: value for name, value in state.items() if name not in KEPT}
            whole["state"][key] = rest | {QUANTISED: {name: state[name] for name in KEPT if name in state}}
        return whole

    def load_state_dict(self, whole):
        state = {key: {**value, **value.get(QUANTISED, {})} for key, value in whole["state"].items()}
        for value in state.values():
            value.pop(QUANTISED, None)
        places = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()  # torch's own would make float32 of the codes
        self.state.update({places[key]: value for key, value in state.items()})
        for own, group in zip(self.param_groups, whole["param_groups"], strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
"""


def install(folder: Path, device: str = "cpu") -> None:
    """Write the package to a folder, which is then put on the path."""
    (folder / "bitsandbytes").mkdir(parents=True)
    (folder / "bitsandbytes" / "__init__.py").write_text("", "utf-8")
    (folder / "bitsandbytes" / "optim.py").write_text(f"DEVICE = {device!r}\n{CODE}", "utf-8")

"""Put load on a reward server: requests a second, many connections at once, and its memory over thousands of requests.

python scripts/research/server_load.py [--requests 5000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from condrl.commands.console import exit_code
from condrl.io.records import write_json
from condrl.prompts import Row
from condrl.rewards.client import Client
from condrl.rewards.testing import smooth_images
from condrl.rewards.wire import answer_of, pack
from condrl.training.host import provenance

SERVER = Path(__file__).resolve().parents[1] / "reward_server.py"
SIDE = 512  # pixels of the images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="over which memory is watched")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    command = [sys.executable, str(SERVER), "brightness", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            found = load(server.stdout.readline().split()[-1], server.pid, args.requests)
        finally:
            server.kill()
    if args.json:
        write_json(args.json, {**found, **provenance()})
    print(json.dumps(found))


def load(url: str, pid: int, requests: int) -> dict[str, Any]:
    """How a server at an address behaves under load."""
    found: dict[str, Any] = {}
    images = torch.nn.functional.interpolate(smooth_images(16), SIDE)
    for batch in (1, 16):
        body = pack(images[:batch], [Row(0, "a prompt")] * batch)
        begun, count = time.monotonic(), 320 // batch
        failed = ask(url, body, batch, count)
        per_second = count / (time.monotonic() - begun)
        found[f"batch_{batch}"] = dict(requests_per_second=per_second, kB=len(body) / 1000, failed=failed)
    gate = Barrier(100)
    body = pack(images[:1], [Row(0, "a prompt")])

    def one(_: int) -> str:
        client = Client(url, "url", None, 60.0, 0, 0.0, 1)
        gate.wait()
        scored = client.ask([body], [partial(answer_of, count=1)])[0] is not None
        return "scored" if scored else client.errors[0].removeprefix(f"{url} ")

    with ThreadPoolExecutor(100) as pool:
        found["a_hundred_at_once"] = dict(Counter(pool.map(one, range(100))))
    small = pack(torch.rand(16, 3, 64, 64), [Row(0, "a prompt")] * 16)
    failed, memory = 0, [resident_mb(pid)]
    for _ in range(10):
        failed += ask(url, small, 16, requests // 10)
        memory.append(resident_mb(pid))
    return found | {"long": dict(requests=requests, failed=failed, resident_mb=memory)}


def ask(url: str, body: bytes, batch: int, count: int) -> int:
    """Ask `count` times, four at a time; returns how many failed."""
    client = Client(url, "url", None, 60.0, 0, 0.0, 4)
    return client.ask([body] * count, [partial(answer_of, count=batch)] * count).count(None)


def resident_mb(pid: int) -> float:
    """Resident memory of a process on Linux."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000


if __name__ == "__main__":
    sys.exit(exit_code(main))

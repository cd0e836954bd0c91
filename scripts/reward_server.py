"""Serve a reward over HTTP, for `rewards.remote` of a run in another process, environment or machine.

    python scripts/reward_server.py REWARD [key=value ...] [--plugin my_reward.py] [--port 8200]

    accelerate launch scripts/finetune.py rewards.remote.weight=1 rewards.remote.url=http://127.0.0.1:8200

It listens on this machine alone unless --host says otherwise; then both sides need a token in the environment variable
CONDRL_REWARD_TOKEN. Requests are JSON with PNG images (condrl/wire.py).
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from condrl.config import typed_options
from condrl.errors import UsageError, brief, exit_code, say
from condrl.registry import load_file
from condrl.registry import reward as registry
from condrl.words import is_setting, merged, read_word, retyped

if TYPE_CHECKING:
    from condrl.rewards import Reward

TOKEN = "CONDRL_REWARD_TOKEN"


class Server(ThreadingHTTPServer):
    """A reward behind HTTP; requests are read at once and scored one after the other."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reward: Reward, token: str | None, device: Any) -> None:
        super().__init__(address, Handler)
        self.reward, self.token, self.device, self.busy = reward, token, device, threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, say, is a line."""
        error = sys.exception()
        say(f"warning: no answer to {client_address[0]}: {brief(error) if error else ''}")

    def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and content for a request: scores, null where one failed; or what is wrong."""
        import torch

        from condrl.wire import unpack

        with self.busy, torch.no_grad():
            try:
                samples, rows = unpack(body)
            except Exception as error:
                return 400, {"error": brief(error)}
            try:
                found = self.reward(samples.to(self.device), rows)
            except Exception as error:
                return 500, {"error": brief(error)}
        return 200, {"scores": [value if value == value else None for value in found.tolist()]}


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds for a client to send what it announced

    def do_GET(self) -> None:
        self.reply(200, {"reward": self.server.reward.name})

    def do_POST(self) -> None:
        from condrl.wire import MOST_BYTES

        given, size = self.headers.get("Authorization", ""), self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            return self.reply(413, {"error": f"a request needs a length of at most {MOST_BYTES} bytes"})
        body = self.rfile.read(int(size))  # also of one that is refused: else its client hears nothing but an error
        if self.server.token and not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            return self.reply(401, {"error": "the token is missing or another one"})
        return self.reply(*self.server.answer(body))

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a run makes many requests."""


def serve(args: argparse.Namespace) -> None:
    """Serve until stopped.

    Raises: UsageError when the reward cannot be made, the device is missing, or the address cannot be listened on.
    """
    from condrl.run import find_device

    token = os.environ.get(TOKEN)
    if args.host not in ("127.0.0.1", "localhost") and not token:
        raise UsageError(f"--host {args.host} lets others in: set a token in the environment variable {TOKEN}")
    device = find_device(args.device)
    reward = reward_of(args)
    try:
        server = Server((args.host, args.port), reward, token, device)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {args.host}:{args.port}: {reason}") from error
    print(f"{args.reward} on http://{args.host}:{server.server_address[1]}", flush=True)
    with server:
        server.serve_forever()


def reward_of(args: argparse.Namespace) -> Reward:
    """The reward that the command line asks for, its files loaded.

    Raises: UsageError when it cannot be had.
    """
    from condrl.rewards import make_reward

    for path in args.plugin:
        load_file(path)
    plugin = registry.find(args.reward)
    if wrong := [word for word in args.options if not is_setting(word)]:
        raise UsageError(f"{wrong[0]!r} is not an option of the reward: options are written key=value")
    types = {option.name: option.type for option in plugin.options.values()}
    parts = [retyped(read_word(f"options.{word}"), {"options": types}) for word in args.options]
    given = merged(parts).get("options", {})
    reward = make_reward(args.reward, typed_options(plugin, given, args.reward))
    reward.load()
    return reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", help="a registered reward")
    parser.add_argument("options", nargs="*", metavar="key=value", help="its options")
    parser.add_argument("--plugin", action="append", default=[], help="a file with your own rewards; may be repeated")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8200, help="0: any that is free")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    serve(parser.parse_args())


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Serve a reward over HTTP, for `rewards.remote` of a run in another process, environment or machine.

    condrl serve REWARD [key=value ...] [--plugin my_reward.py] [--port 8200]

    condrl finetune rewards.remote.weight=1 rewards.remote.url=http://127.0.0.1:8200

It listens on this machine alone unless --host says otherwise; then both sides need a token in the environment variable
CONDRL_REWARD_TOKEN. Requests are JSON with PNG images (condrl/rewards/wire.py).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from condrl.commands.arguments import parser_of
from condrl.commands.console import exit_code
from condrl.config import typed_options
from condrl.errors import UsageError
from condrl.io.overrides import is_setting, merged, read_argument, retyped
from condrl.io.plugin_files import load_file
from condrl.registry import reward as registry

if TYPE_CHECKING:
    from condrl.rewards.scoring import Reward


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("serve", __doc__)
    parser.add_argument("reward", help="a registered reward")
    parser.add_argument("options", nargs="*", metavar="key=value", help="its options")
    parser.add_argument("--plugin", action="append", default=[], help="a file with your own rewards; may be repeated")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8200, help="0: any free port")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Exit code: 2 for bad input; otherwise it serves until it is stopped."""
    return exit_code(lambda: serve(parse(words)))


def serve(args: argparse.Namespace) -> None:
    """Serve until stopped.

    Raises: UsageError when the reward cannot be made, the device is missing, or the address cannot be listened on.
    """
    from condrl.rewards.client import LOCAL
    from condrl.rewards.server import Server
    from condrl.rewards.wire import TOKEN, read_secret
    from condrl.training.host import find_device

    token = read_secret(TOKEN)
    if args.host not in LOCAL and not token:
        raise UsageError(f"--host {args.host} lets others in: set a token in the environment variable {TOKEN}")
    device = find_device(args.device)
    reward = reward_of(args)
    try:
        server = Server((args.host, args.port), reward, token, device)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {args.host}:{args.port}: {reason}") from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{args.reward} on http://{host}:{server.server_address[1]}", flush=True)
    with server:
        server.serve_forever()


def reward_of(args: argparse.Namespace) -> Reward:
    """The reward that the command line asks for, its files loaded.

    Raises: UsageError when it cannot be made.
    """
    from condrl.rewards.scoring import make_reward

    for path in args.plugin:
        load_file(path)
    plugin = registry.find(args.reward)
    if plugin.per == "group":
        raise UsageError(
            f"the reward {args.reward!r} compares the images of a prompt, and a request has some of several prompts: "
            "it cannot be served, name it in the run's own plugins"
        )
    if wrong := [option for option in args.options if not is_setting(option)]:
        raise UsageError(f"{wrong[0]!r} is not an option of the reward: options are written key=value")
    types = {option.name: option.type for option in plugin.options.values()}
    parts = [retyped(read_argument(f"options.{option}"), {"options": types}) for option in args.options]
    given = merged(parts).get("options", {})
    reward = make_reward(args.reward, typed_options(plugin, given, args.reward))
    reward.load()
    return reward

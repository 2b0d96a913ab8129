"""The `zephyr` command: run and plan recipes, talk to what came out."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from zephyr_ray import pipeline
from zephyr_ray.errors import Permanent
from zephyr_ray.store import MANIFEST

CHAT_TOKENS = 256
CHAT_CONTEXT = 2048


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are the pipeline's."""
    parser = argparse.ArgumentParser("zephyr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | plan | chat")
    commands.add_parser("run", help="run a recipe (python -m zephyr_ray.pipeline)", add_help=False)
    commands.add_parser("plan", help="show what a run would do, and why", add_help=False)
    chat = commands.add_parser("chat", help="talk to a model of a run")
    chat.add_argument("run", type=Path, help="the folder of a run, such as runs/quickstart")
    chat.add_argument("--model", help="a training stage (default: the last one trained)")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "run":
        return pipeline.main(rest)
    if options.command == "plan":
        return pipeline.main([*rest, "--plan"])
    if rest:
        chat.error(f"unknown argument {rest[0]}")
    try:
        return talk(find_model(options.run, options.model))
    except Permanent as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def find_model(run: Path, name: str | None) -> Path:
    """The folder of a trained model of a run: the one named, else the newest."""
    models = {link.name: link.resolve() for link in sorted((run / "models").glob("*"))}
    if not models:
        raise Permanent(f"{run} has no models/; give the folder of a run that trained one")
    if name is None:
        try:
            made = {n: json.loads((m.parent / MANIFEST).read_text()) for n, m in models.items()}
        except (OSError, ValueError) as error:
            raise Permanent(
                f"{run} has a damaged model ({error}); name another with --model"
            ) from None
        name = max(made, key=lambda n: str(made[n]["created"]))
    if name not in models:
        raise Permanent(f"{run} has no model '{name}'; it has {', '.join(models)}")
    return models[name]


def talk(model: Path) -> int:
    """Questions from standard input, answers to standard output, until its end."""
    from zephyr_ray.models.contract import Message, Sampling, assistant, user
    from zephyr_ray.models.vllm import VllmEngine

    print(f"starting {model.parent.name} …", file=sys.stderr)
    import torch

    engine = VllmEngine(str(model), CHAT_CONTEXT, gpu=torch.cuda.is_available(), seed=0)
    print("ask something; an empty line starts anew, ctrl-D ends", file=sys.stderr)
    messages: list[Message] = []
    with asyncio.Runner() as runner:
        while True:
            try:
                question = input("\n> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            if not question:
                messages = []
                continue
            messages.append(user(question))
            sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=CHAT_TOKENS)
            try:
                reply = runner.run(engine.answer(messages, sampling))
            except Permanent as error:
                print(f"{error}; starting anew", file=sys.stderr)
                messages = []
                continue
            print(reply.text, flush=True)
            messages.append(assistant(reply.text))


if __name__ == "__main__":
    sys.exit(main())

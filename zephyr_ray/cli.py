"""The `zephyr` command: run and plan recipes, serve what came out, talk to it."""

import argparse
import sys
from pathlib import Path

from zephyr_ray import pipeline
from zephyr_ray.errors import Permanent
from zephyr_ray.run_folder import models_of


def main(arguments: list[str] | None = None) -> int:
    """Exit codes are the pipeline's."""
    parser = argparse.ArgumentParser("zephyr", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | plan | serve | chat"
    )
    commands.add_parser("run", help="run a recipe (python -m zephyr_ray.pipeline)", add_help=False)
    commands.add_parser("plan", help="show what a run would do, and why", add_help=False)
    serve = commands.add_parser("serve", help="serve the models and the judge of a run")
    _serve_arguments(serve)
    chat = commands.add_parser("chat", help="talk to a model of a run, or to a service")
    chat.add_argument("run", help="the folder of a run, such as runs/quickstart, or http://…")
    chat.add_argument("--model", help="its name (default: the last one trained)")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "run":
        return pipeline.main(rest)
    if options.command == "plan":
        return pipeline.main([*rest, "--plan"])
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    try:
        if options.command == "serve":
            return _serve(options)
        return _chat(options.run, options.model)
    except Permanent as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("run", type=Path, help="the folder of a run, such as runs/quickstart")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1", help="another one needs ZEPHYR_API_KEYS")
    serve.add_argument("--models", help="names, comma-separated (default: all of the run)")
    serve.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    serve.add_argument("--replicas", type=int, default=1, help="least, of each model")
    serve.add_argument("--max-replicas", type=int, help="most, of each model")
    serve.add_argument("--gpus", type=int, default=0, help="of one replica")
    serve.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer")
    serve.add_argument("--max-tokens", type=int, default=1024, help="most of one answer")
    serve.add_argument("--requests-per-minute", type=int, default=600, help="of one key")
    serve.add_argument("--log-prompts", action="store_true")


def _serve(options: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from zephyr_ray.serve.app import ServeSettings
    from zephyr_ray.serve.command import serve

    settings = vars(options) | {"adapters": dict(a.partition("=")[::2] for a in options.adapter)}
    for name in ("command", "host", "port", "adapter"):
        settings.pop(name)
    try:
        return serve(ServeSettings.model_validate(settings), options.host, options.port)
    except ValidationError as error:
        first = error.errors()[0]
        raise Permanent(f"--{first['loc'][0]}: {first['msg']}") from None


def _chat(run: str, model: str | None) -> int:
    from zephyr_ray.talk import Local, Remote, talk

    if run.startswith(("http://", "https://")):
        return talk(Remote(run, model))
    known = models_of(Path(run))
    name = model or list(known)[-1]
    if name not in known:
        raise Permanent(f"{run} has no model '{name}'; it has {', '.join(known)}")
    print(f"starting {name} …", file=sys.stderr)
    return talk(Local(known[name]))


if __name__ == "__main__":
    sys.exit(main())

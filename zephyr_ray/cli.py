"""Runs recipes here or on a cluster, and serves the results: the `zephyr` command."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from zephyr_ray import pipeline, recipe_file
from zephyr_ray import recipe as recipes
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.masking import ArgumentParser
from zephyr_ray.models.weights import fingerprint
from zephyr_ray.preflight import check_files, check_processors
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import models_of


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, as `pipeline.main` does."""
    parser = ArgumentParser("zephyr", description=__doc__)
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="run | plan | compare | serve | chat | export | "
        "submit | status | logs | stop | doctor",
    )
    commands.add_parser("run", help="run a recipe (python -m zephyr_ray.pipeline)", add_help=False)
    commands.add_parser("plan", help="show what a run would do, and why", add_help=False)
    _compare_arguments(commands)
    serve = commands.add_parser("serve", help="serve the models and the judge of a run")
    _serve_arguments(serve)
    chat = commands.add_parser("chat", help="chat with a model of a run or of a service")
    chat.add_argument("run", help="folder of a run, such as runs/quickstart, or http://…")
    chat.add_argument("--model", help="name of the model (default: the last one trained)")
    _export_arguments(commands)
    _cluster_arguments(commands)
    options, unknown = parser.parse_known_args(arguments)
    if options.command == "run":
        return pipeline.main(unknown)
    if options.command == "plan":
        return pipeline.main([*unknown, "--plan"])
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    try:
        if options.command == "compare":
            return _compare(options)
        if options.command == "serve":
            return _serve(options)
        if options.command == "chat":
            return _chat(options.run, options.model)
        if options.command == "export":
            return _export(options)
        return _cluster(options)
    except Permanent as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Temporary as error:
        print(f"error: {' '.join(str(error).split())}; try again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _compare_arguments(commands: "argparse._SubParsersAction[ArgumentParser]") -> None:
    compare = commands.add_parser("compare", help="compare runs on one page")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    output = compare.add_mutually_exclusive_group()
    output.add_argument(
        "--out",
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="the page to write (default: compare.html)",
    )
    output.add_argument(
        "--markdown",
        action="store_true",
        help="print the figures as Markdown tables instead; also works for one run",
    )


def _serve_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("run", type=Path, help="folder of a run, such as runs/quickstart")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1; others need ZEPHYR_API_KEYS"
    )
    serve.add_argument("--models", help="names, comma-separated (default: all of the run)")
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="LoRA adapter on the first model; may be repeated",
    )
    serve.add_argument("--replicas", type=int, default=1, help="minimum per model (default: 1)")
    serve.add_argument("--max-replicas", type=int, help="maximum per model (default: --replicas)")
    serve.add_argument("--gpus", type=int, default=0, help="GPUs per replica (default: 0, CPU)")
    serve.add_argument(
        "--context",
        type=int,
        help="maximum tokens of prompt and answer together (default: 2048, or the model's maximum)",
    )
    serve.add_argument(
        "--max-tokens", type=int, default=1024, help="maximum tokens per answer (default: 1024)"
    )
    serve.add_argument(
        "--requests-per-minute", type=int, default=600, help="maximum per key (default: 600)"
    )
    serve.add_argument("--log-prompts", action="store_true", help="write prompts to the log")


def _export_arguments(commands: "argparse._SubParsersAction[ArgumentParser]") -> None:
    export = commands.add_parser("export", help="write a model or data set with a card for a hub")
    export.add_argument("run", type=Path, help="folder of a run, such as runs/quickstart")
    export.add_argument("stage", help="a stage that makes a model or data")
    export.add_argument("folder", type=Path, help="the folder to write")
    export.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="precision of a model's weights (default: fp32)"
    )
    export.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="also upload it to this repository, which is created as private; needs HF_TOKEN",
    )


def _cluster_arguments(commands: "argparse._SubParsersAction[ArgumentParser]") -> None:
    submit = commands.add_parser("submit", help="run a recipe as a RayJob on a Kubernetes cluster")
    submit.add_argument("recipe", type=Path)
    submit.add_argument(
        "--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="as for run"
    )
    submit.add_argument(
        "--wait", action="store_true", help="wait for the job and exit with its code"
    )
    submit.add_argument("--follow", action="store_true", help="show the log; implies --wait")
    submit.add_argument(
        "--dry-run", action="store_true", help="print the objects as YAML and create nothing"
    )
    status = commands.add_parser("status", help="list the jobs of the cluster, or show one")
    status.add_argument("job", nargs="?")
    logs = commands.add_parser("logs", help="show the log of a job")
    logs.add_argument("job")
    logs.add_argument(
        "--follow",
        action="store_true",
        help="show the log until the job ends, then exit with its code",
    )
    stop = commands.add_parser("stop", help="end a job and keep its finished stages and rows")
    stop.add_argument("job")
    doctor = commands.add_parser("doctor", help="check whether the cluster can run a recipe")
    doctor.add_argument("recipe", nargs="?", type=Path)
    doctor.add_argument(
        "--pull", action="store_true", help="also start a short-lived pod per image"
    )
    for command in (submit, status, logs, stop, doctor):
        command.add_argument(
            "--profile",
            type=Path,
            default=Path("zephyr-cluster.yaml"),
            metavar="FILE",
            help="profile of the cluster (default: zephyr-cluster.yaml)",
        )


def _cluster(options: argparse.Namespace) -> int:
    from zephyr_ray.cluster import command
    from zephyr_ray.cluster.doctor import doctor
    from zephyr_ray.cluster.profile import check_secrets, load

    if options.command == "submit":
        raw, recipe = _load_checked(options.recipe, options.set)
        profile = load(options.profile)
        check_processors(recipe, recipe.stages, profile.cpus, profile.gpus, str(options.profile))
        check_secrets(recipe, profile, options.profile)
        if options.dry_run:
            if options.wait or options.follow:
                raise Permanent("--dry-run creates no job; remove --wait and --follow")
            return command.show_objects(options.recipe, raw, recipe, profile)
        return command.submit(options.recipe, raw, recipe, profile, options.wait, options.follow)
    if options.command == "doctor":
        checked = _load_checked(options.recipe, [])[1] if options.recipe else None
        profile = load(options.profile)
        if checked:
            check_processors(
                checked, checked.stages, profile.cpus, profile.gpus, str(options.profile)
            )
        return doctor(profile, checked, options.pull)
    kube = command.connect_kube(options.profile)
    if options.command == "status":
        return command.status(kube, options.job)
    if options.command == "logs":
        return command.logs(kube, options.job, options.follow)
    return command.stop(kube, options.job)


def _load_checked(path: Path, overrides: list[str]) -> tuple[dict[str, Any], Recipe]:
    """Checks a recipe, except files on the cluster, and returns it as written and as loaded."""
    recipe = recipes.load(path, pipeline.KINDS, overrides)
    check_files(recipe, absolute=False)
    for model in recipe.models.values():
        written = (Path(getattr(model.settings, setting)) for setting in model.files)
        if not any(path.is_absolute() for path in written):
            model.check_files()
        for source in model.sources.values():
            if not Path(source).is_absolute():
                fingerprint(source)  # raises Permanent if the name is unknown
    return recipe_file.read(path, overrides)[0], recipe


def _serve(options: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from zephyr_ray.serve.app import ServeSettings
    from zephyr_ray.serve.command import serve

    for adapter in options.adapter:
        if not re.fullmatch("[^=]+=.+", adapter):
            raise Permanent(f"--adapter {adapter}: not an assignment; write NAME=FOLDER")
    settings = vars(options) | {"adapters": dict(a.split("=", 1) for a in options.adapter)}
    for name in ("command", "host", "port", "adapter"):
        settings.pop(name)
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return serve(ServeSettings.model_validate(given), options.host, options.port)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise Permanent(f"--{flag}: {first['msg'].removeprefix('Value error, ')}") from None


def _chat(run: str, model: str | None) -> int:
    from zephyr_ray.talk import Local, Remote, talk

    if run.startswith(("http://", "https://")):
        return talk(Remote(run, model))
    if not Path(run).exists() and re.search(":\\d+", run):
        raise Permanent(f"{run} is not a folder; begin an address with http:// or https://")
    models = models_of(Path(run))
    name = model or list(models)[-1]
    if name not in models:
        raise Permanent(f"{run} has no model '{name}'; use one of {', '.join(models)}")
    print(f"starting {name} …", file=sys.stderr)
    return talk(Local(models[name]))


def _compare(options: argparse.Namespace) -> int:
    from zephyr_ray.comparison.command import compare, print_markdown

    if options.markdown:
        return print_markdown(options.runs, pipeline.KINDS)
    return compare(options.runs, options.out, pipeline.KINDS)


def _export(options: argparse.Namespace) -> int:
    from zephyr_ray.export.command import export

    run, stage, folder = options.run, options.stage, options.folder
    shipped = pipeline.default_recipe().parent
    return export(run, stage, folder, options.dtype, options.push, pipeline.KINDS, shipped)


if __name__ == "__main__":
    sys.exit(main())

"""The ``empg-jax`` command: train, evaluate, export, warm-start, look at a configuration, check the install.

Modules that load JAX are imported inside the commands, so that ``--help`` and configuration errors appear
quickly. Results go to stdout (the run's folder is the last line), everything else to stderr. Exit codes: 0
done, 1 the run failed, 2 the configuration or the command line is wrong, 130 and 143 ended by SIGINT and
SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from empg_jax import __version__
from empg_jax.config import Config, check_resumable, describe, list_choices, load_config
from empg_jax.config.model_source import load_for_model
from empg_jax.config.yaml import find_packaged
from empg_jax.errors import ConfigError, Stopped, UserError
from empg_jax.files import as_json
from empg_jax.run.folder import check_run, is_finished, split_checkpoint

app = typer.Typer(
    name="empg-jax",
    help="Train multi-turn LLM agents in JAX with entropy-modulated policy gradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A packaged name (quickstart) or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, for example train.updates=200; 'empg-jax config --keys' lists all.",
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A packaged name (quickstart) or the path of a YAML file."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder; only train.updates, compile_cache and log.* may change."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="With --resume: the checkpoint to go on from (default: the newest)."),
    ] = None,
) -> None:
    """Train an agent (warm start first when sft.updates > 0) and print the run's folder."""
    with _reporting():
        changes = list(overrides or [])
        if resume is not None and config is not None:
            changes.insert(0, config)  # --resume takes no CONFIG, so the first word is an override
        if resume is not None:
            resolved = _load_run(resume, changes)
            if step is None and is_finished(resume, resolved):
                told = f"{resume} is finished: all {resolved.train.updates} updates are made"
                typer.echo(f"{told}; more with train.updates=N", err=True)
                typer.echo(resume.absolute())
                return
        elif step is not None:
            raise ConfigError(f"--step {step} names a checkpoint of a run: give --resume RUN, too")
        elif config is None:
            raise ConfigError("name a configuration (empg-jax train quickstart), or go on with --resume RUN")
        else:
            resolved = _load(config, changes)
        from empg_jax.trainer import train as run_training

        options = {} if step is None else {"step": step}
        typer.echo(run_training(resolved, resume=resume, **options).absolute())


@app.command()
def sft(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train on expert demonstrations or on chat files (sft.data=FILE.jsonl) only; print the run's folder."""
    with _reporting():
        resolved = _load(config, overrides or [])
        if resolved.sft.updates == 0:
            raise ConfigError("sft.updates=0: nothing to do; set sft.updates, for example sft.updates=200")
        from empg_jax.trainer import run_sft

        typer.echo(run_sft(resolved).absolute())


@app.command("eval")
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Folder of a run or of a checkpoint; with --env or --config a Hugging Face folder, hub id, "
            "or preset (random weights).",
        ),
    ],
    overrides: Overrides = None,
    *,
    tasks: Annotated[int | None, typer.Option(help="Held-out tasks (eval.tasks).")] = None,
    split: Annotated[str | None, typer.Option(help="Panel of tasks (env.eval_split).")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature (eval.temperature).")
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts at each task: mean@k and pass@k.")] = 1,
    env: Annotated[
        str | None,
        typer.Option(help="For a model: environment, with the prompts of its packaged configuration."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="For a model: configuration that says how prompts are built.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for eval.json and eval.md (default RUN/eval; none for a model)."),
    ] = None,
) -> None:
    """Evaluate a policy on held-out tasks; the result is one JSON object on stdout.

    Intervals are of 95 %, over tasks: Wilson's where a task is solved or not, else a bootstrap.
    Where the environment names the families of its tasks, each has estimates of its own.

    empg-jax eval runs/NAME --attempts 4 --tasks 64

    empg-jax eval Qwen/Qwen2.5-0.5B-Instruct --env household rollout.slots=16 --out results
    """
    with _reporting():
        # Options are short forms of overrides, so there is one path and one set of checks.
        options = {"eval.tasks": tasks, "env.eval_split": split, "eval.temperature": temperature}
        changes = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
        changes = [*(overrides or []), *changes]
        more = {} if attempts == 1 else {"attempts": attempts}
        from empg_jax.report.evaluation import check_out, write_evaluation

        check_out(out)
        if env is None and config is None:
            check_run(Path(source))
            from empg_jax.evaluate import evaluate_run

            result = evaluate_run(Path(source), changes, **more)
            out = out or split_checkpoint(Path(source))[0] / "eval"
        else:
            from empg_jax.evaluate import evaluate_model
            from empg_jax.hf.presets import PRESETS

            model = load_for_model(source, changes, env=env, config=config, presets=list(PRESETS), say=_say)
            for note in _check_environment(model):
                _say(f"note: {note}")

            result = evaluate_model(source, model, **more)
        typer.echo(json.dumps(as_json(result), allow_nan=False))
        if out is not None:
            write_evaluation(out, result)
            _say(f"{out / 'eval.json'} and {out / 'eval.md'} are written")


@app.command()
def rollout(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CONFIG", help="Folder of a run or of a checkpoint; or a configuration, untrained."
        ),
    ],
    overrides: Overrides = None,
    *,
    episodes: Annotated[int, typer.Option(help="Episodes, rounded up to whole groups.")],
    out: Annotated[
        Path, typer.Option(help="File to write: JSON lines (FILE.gz compressed), or FILE.npz to train on.")
    ],
) -> None:
    """Play training episodes without learning; write records for 'empg-jax credit', or .npz to train on."""
    with _reporting():
        changes = list(overrides or [])
        resolved = None if Path(source).is_dir() else _load(source, changes)
        from empg_jax.run.play import play_new, play_run

        if resolved is None:
            play_run(Path(source), changes, episodes, out, _say)
        else:
            play_new(resolved, episodes, out, _say)
        typer.echo(out.absolute())


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Folder of a run or of a checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")],
    overrides: Overrides = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--merged", help="The adapter alone (PEFT), or the whole model with it merged in."
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default model.param_dtype).")
    ] = None,
) -> None:
    """Write a trained policy as a folder that transformers and vLLM load, and print the folder."""
    with _reporting():
        check_run(path)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"--dtype {dtype} is unknown; choose float32, bfloat16 or float16")
        from empg_jax.run.export import export_run

        written = export_run(
            path,
            out,
            adapter=adapter,
            dtype=dtype,
            overrides=overrides or [],
            say=_say,
        )
        typer.echo(written.absolute())


@app.command("config")
def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A packaged name or a YAML file.")
    ] = None,
    overrides: Overrides = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="List every key with its default, its choices and its meaning.")
    ] = False,
    packaged: Annotated[bool, typer.Option("--list", help="List the packaged configurations.")] = False,
) -> None:
    """Check a configuration and print it resolved."""
    with _reporting():
        if keys:
            _print_keys()
        elif packaged:
            _print_packaged()
        elif config is None:
            raise ConfigError("name a configuration (empg-jax config quickstart), or ask for --list, --keys")
        else:
            resolved = _load(config, overrides or [])
            for note in resolved.notes:
                typer.echo(f"note: {note}", err=True)
            typer.echo(resolved.to_yaml(), nl=False)


@app.command()
def credit(
    config: ConfigArgument,
    episodes: Annotated[
        Path, typer.Argument(metavar="EPISODES", help="Episode records (.jsonl or .jsonl.gz): one batch.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File to write in place of stdout.")] = None,
) -> None:
    """Recompute the credit of recorded or hand-made episodes, and print the records with it."""
    with _reporting():
        resolved = load_config(config, overrides or [])
        # The batch is small and there is no model: starting an accelerator would take longer than the work.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from empg_jax.run.credit import print_credit

        print_credit(resolved, episodes, out, say=lambda line: typer.echo(line, err=True))


@app.command()
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, or folder to write it into (default RUN/view.html).")
    ] = None,
    what_if: Annotated[
        str, typer.Option(help="Other algorithms to compute the credit of, for example grpo,grpo_aem.")
    ] = "",
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine; it follows a run that trains.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a free one.")] = 0,
) -> None:
    """Write a run as one page: episodes with the credit of every turn, groups side by side, curves.

    The page opens without a network and can be mailed. It shows the files in RUN/rollouts
    (log.rollouts_every); with log.rollouts_tokens=true every token has its color. Press ? in it for its keys.
    """
    with _reporting():
        from empg_jax.run.view import serve_run, view_run

        if serve and out is not None:
            raise ConfigError("--serve writes no file: give --out or --serve")
        names = [name for name in what_if.split(",") if name]
        others = {
            name: load_config(run / "config.yaml", [f"algorithm.name={name}"], drop_unused=True)
            for name in names
        }
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # as for credit
        if serve:
            serve_run(run, port=port, what_if=others, tell=typer.echo)
        else:
            typer.echo(view_run(run, out=out, what_if=others, say=_say).absolute())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, of several seeds.")],
    out: Annotated[Path, typer.Option(help="Folder to write into; it is made.")] = Path("report"),
) -> None:
    """Compare runs over seeds: report.html, report.png and report.csv.

    Runs with equal settings but another seed form an arm; the arm of the first run is what the others are
    compared with, paired by seed. Means, interquartile means, 95 % bootstrap intervals, areas under curves.
    """
    with _reporting():
        from empg_jax.report.comparison_page import report_runs

        typer.echo(report_runs(runs, out).absolute())


@app.command()
def metrics() -> None:
    """Print every metric that a run logs, with its meaning."""
    from empg_jax.metrics import format_glossary

    typer.echo(format_glossary())


@app.command()
def envs() -> None:
    """List the environments: what they are, their levels, and their panels of tasks with default options."""
    from empg_jax.run.lists import format_list, list_envs

    typer.echo(format_list(list_envs()))


@app.command()
def configs() -> None:
    """List the packaged configurations."""
    from empg_jax.run.lists import format_list, list_configs

    typer.echo(format_list(list_configs()))


@app.command()
def algorithms() -> None:
    """List the algorithms (algorithm.name) with their recipes."""
    from empg_jax.run.lists import format_list, list_algorithms

    typer.echo(format_list(list_algorithms()))


@app.command()
def play(
    env: Annotated[
        str, typer.Argument(metavar="ENV", help="A name ('empg-jax envs') or package.module:attribute.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the environment, for example level=easy."),
    ] = None,
    *,
    expert: Annotated[bool, typer.Option("--expert", help="Let the environment's expert act.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed; it also draws the task.")] = 0,
    task: Annotated[int | None, typer.Option(help="Number of the task in its panel.")] = None,
    split: Annotated[str | None, typer.Option(help="Panel of tasks (default the first).")] = None,
) -> None:
    """Be the agent: play one episode in the terminal, with actions from the keyboard or a pipe.

    empg-jax play household level=easy --task 3

    empg-jax play alfworld < actions.txt
    """
    with _reporting():
        from empg_jax.run.terminal import play_episode

        play_episode(env, options or [], split=split, task=task, seed=seed, is_expert=expert, say=typer.echo)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices to plan for, by mesh.fsdp (default: those of mesh).")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0, help="Memory of a device in GiB, to compare with.")
    ] = None,
    chip: Annotated[
        str | None, typer.Option(help="h100, v5e, v5p or v6e: expected times too, and its memory.")
    ] = None,
) -> None:
    """Print the memory that a run needs on each device, without weights and without running."""
    with _reporting():
        from empg_jax.plan.explain import explain

        def load(changes: Sequence[str]) -> Config:
            return load_config(config, [*(overrides or []), *changes])

        lines = explain(load, devices, None if memory_gib is None else memory_gib * 2**30, chip)
        typer.echo("\n".join(lines))


@app.command("simulate")
def show_simulation(
    config: ConfigArgument,
    overrides: Overrides = None,
    *,
    latency: Annotated[float | None, typer.Option(help="Seconds of an environment's answer.")] = None,
    latency_kind: Annotated[
        str | None, typer.Option(help="constant, uniform, exponential, lognormal or heavy.")
    ] = None,
    reset_latency: Annotated[float | None, typer.Option(help="Of a reset (default as of a step).")] = None,
    turns: Annotated[float | None, typer.Option(help="Mean turns of an episode.")] = None,
    turns_kind: Annotated[str | None, typer.Option(help="Their spread (default uniform).")] = None,
    tokens: Annotated[float | None, typer.Option(help="Mean tokens of a response.")] = None,
    tokens_kind: Annotated[str | None, typer.Option(help="Their spread (default uniform).")] = None,
    observation: Annotated[
        float | None, typer.Option(help="Prompt tokens that each turn adds; they cost with --prefill-rate.")
    ] = None,
    long_share: Annotated[float | None, typer.Option(help="Share of the tasks that are long.")] = None,
    long_stretch: Annotated[float | None, typer.Option(help="Their turns, as a multiple.")] = None,
    failures: Annotated[
        float | None, typer.Option(help="Share of the attempts whose environment fails.")
    ] = None,
    deaths: Annotated[float | None, typer.Option(help="Share that takes its worker down.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Environments that can answer at the same time (default all).")
    ] = None,
    decode_rate: Annotated[
        float | None, typer.Option(help="Tokens per second of all slots together.")
    ] = None,
    slot_rate: Annotated[
        float | None, typer.Option(help="Most tokens per second of one slot (default its share).")
    ] = None,
    prefill_rate: Annotated[float | None, typer.Option(help="Prompt tokens per second.")] = None,
    update_seconds: Annotated[float | None, typer.Option(help="Seconds of an update.")] = None,
    publish_pause: Annotated[float | None, typer.Option(help="Seconds of a swap of weights.")] = None,
    updates: Annotated[int, typer.Option(help="Updates to simulate.")] = 50,
    lags: Annotated[str, typer.Option(help="Values of train.max_lag, one row each.")] = "0,1,2,4",
    splits: Annotated[
        str | None,
        typer.Option(help="ENGINE:LEARNER devices, or a number that both share, for example 1:7,4:4,8."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Take what is not given from this run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate rollout and learner on a clock, to choose train.max_lag and the split of devices.

    The rules of a run decide what is sampled and trained on; environments, sampler and learner only take
    time. What is not given is assumed, and the answer says so.

    Is it worth it to overlap, if environments take 0.1 s and an update takes 2 s?

    empg-jax simulate quickstart --latency 0.1 --update-seconds 2 --decode-rate 4000 --splits 1,1:1

    How would eight devices be split best, by the speeds of a run on one?

    empg-jax simulate quickstart --from runs/NAME --splits 1:7,2:6,4:4,8
    """
    given = dict(locals())
    for name in ("config", "overrides", "lags", "splits", "measured", "as_json"):
        del given[name]
    with _reporting():
        resolved = load_config(config, overrides or [])
        run = None if measured is None else (measured, _load_run(measured, [], option="--from"))
        from empg_jax.simulate.plan import make_plan, read_lags, read_splits
        from empg_jax.simulate.table import print_plan

        plan = make_plan(
            resolved,
            {name: value for name, value in given.items() if value is not None},
            lags=read_lags(lags),
            splits=None if splits is None else read_splits(splits),
            run=run,
        )
        if as_json:
            typer.echo(json.dumps(plan.as_json()))
        else:
            print_plan(plan, Console(highlight=False))


@app.command()
def retrieve(
    *,
    corpus: Annotated[
        str, typer.Option(help="JSON lines with 'id' and 'contents' (wiki-18's format), maybe gzipped.")
    ],
    retriever: Annotated[str, typer.Option(help="auto, bm25s, builtin, tantivy, or dense.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Folder of a BERT-style encoder, for dense.")] = None,
    query_prefix: Annotated[str, typer.Option(help="Put before queries (E5: 'query: ').")] = "",
    passage_prefix: Annotated[str, typer.Option(help="Put before passages (E5: 'passage: ').")] = "",
    vectors: Annotated[Path | None, typer.Option(help="File (.npz) for the passages' vectors.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    topk: Annotated[int, typer.Option(min=1, max=100, help="Passages where a request does not say.")] = 3,
    cache: Annotated[int, typer.Option(min=0, help="Queries whose results are remembered.")] = 65536,
) -> None:
    """Serve a corpus to search agents, in the language of Search-R1's /retrieve."""
    with _reporting():
        from empg_jax.retrieval.serve import serve_corpus

        prefixes = {"query_prefix": query_prefix, "passage_prefix": passage_prefix}
        try:
            serve_corpus(
                corpus,
                retriever=retriever,
                encoder={"model": model, "cache": vectors, **prefixes} if model is not None else None,
                say=_say,
                host=host,
                port=port,
                topk=topk,
                cache_size=cache,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None


@app.command()
def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="Folder of a run or checkpoint, Hugging Face folder or hub id; a preset or a configuration "
            "serves random weights.",
        ),
    ],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    ready_file: Annotated[
        Path | None, typer.Option(help="File for the address, written when the server answers.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EMPG_API_KEY", show_envvar=True, help="Bearer token that requests need."),
    ] = None,
) -> None:
    """Serve a policy over HTTP, in the languages of OpenAI and vLLM; a signal ends it.

    Routes: GET /health, GET /v1/models, POST /v1/chat/completions, POST /v1/completions, and POST
    /inference/v1/generate (token ids in and out). A conversation keeps its KV: a request that goes on with
    it prefills only what is new (usage.prompt_tokens_details.cached_tokens). return_token_ids=true adds
    token_ids and the field empg: {"version": 1, "entropies", "versions", "logprobs"} with one number per
    sampled token, over the whole distribution. An option that would change the sampling and is not known is
    refused.

    empg-jax serve runs/NAME --port 8000 serve.slots=32

    curl 127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    with _reporting():
        from empg_jax.serve.command import serve_policy

        serve_policy(
            source,
            overrides or [],
            host=host,
            port=port,
            ready_file=ready_file,
            api_key=api_key,
            say=_say,
            announce=typer.echo,
        )


@app.command()
def doctor() -> None:
    """Check this installation: versions, devices, arithmetic, environment workers."""
    with _reporting():
        from empg_jax.report.doctor import check_installation

        if not check_installation(Console(highlight=False)):
            raise typer.Exit(1)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    # Training handles both signals itself. Before and after it, SIGTERM unwinds like Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    # Orbax logs its housekeeping, which is noise to the user; its failures are raised as CheckpointError.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    app()


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _say(line: str) -> None:
    """Print a message for the user to stderr; stdout is for results."""
    typer.echo(line, err=True)


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """Turn expected failures into one message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except UserError as error:
        typer.echo(str(error) if isinstance(error, Stopped) else f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _load(config: str, overrides: list[str]) -> Config:
    resolved = load_config(config, overrides)
    return resolved.with_notes(_check_environment(resolved))


def _load_run(run: Path, overrides: list[str], *, option: str = "--resume") -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{option} {run}: no run there (no {path})")
    check_resumable(overrides)
    return load_config(path, overrides)


def _check_environment(config: Config) -> Iterator[str]:
    """Check the environment and its options before the model is built; yield notes for the person."""
    from empg_jax.run.environment import find_spec, reads_bytes

    if reads_bytes(config, find_spec(config)):
        yield (
            f"{config.env.target} has no closed vocabulary and no tokenizer is named: a token is a byte "
            "(model.tokenizer=bytes), of which rollout.max_tokens and rollout.max_response_tokens are counted"
        )


def _print_keys() -> None:
    from empg_envs import ENVS

    choices = {"env.name": list(ENVS), **list_choices()}
    table = Table(Column("key", no_wrap=True), Column("default", overflow="fold"), "meaning")
    for path, default, meaning in describe():
        shown = "null" if default is None else str(default)
        choose = f" Choices: {', '.join(choices[path])}." if path in choices else ""
        table.add_row(path, shown, meaning + choose)
    Console(highlight=False).print(table)


def _print_packaged() -> None:
    table = Table(Column("configuration", no_wrap=True), "what it is")
    for name, sentence in find_packaged().items():
        table.add_row(name, sentence)
    Console(highlight=False).print(table)

"""Commands that answer: retrieve and serve over HTTP until a signal, chat in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from empg_jax.cli.app import Overrides, app, reporting, say
from empg_jax.errors import ConfigError

# What every server takes.
Host = Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
ReadyFile = Annotated[
    Path | None, typer.Option(help="File for the address, written when the server answers.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="EMPG_API_KEY", show_envvar=True, help="Bearer token that requests need."),
]


@app.command()
def retrieve(
    *,
    corpus: Annotated[
        str, typer.Option(help="JSON lines with 'id' and 'contents' (wiki-18's format), maybe gzipped.")
    ],
    retriever: Annotated[
        str, typer.Option(help="auto, bm25s, builtin, tantivy, dense, faiss, or vectors.")
    ] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Folder of a BERT-style encoder, for dense, faiss and vectors.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="In place of --model: package.module:function, or address of /v1/embeddings."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="For faiss its index file, for vectors an .npy file.")
    ] = None,
    query_prefix: Annotated[str, typer.Option(help="Put before queries (E5: 'query: ').")] = "",
    passage_prefix: Annotated[str, typer.Option(help="Put before passages (E5: 'passage: ').")] = "",
    vectors: Annotated[Path | None, typer.Option(help="File (.npz) for the passages' vectors.")] = None,
    index_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps passages and the index of bm25s or tantivy.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    topk: Annotated[int, typer.Option(min=1, max=100, help="Passages where a request does not say.")] = 3,
    cache: Annotated[int, typer.Option(min=0, help="Queries whose results are remembered.")] = 65536,
) -> None:
    """Serve a corpus to search agents, in the language of Search-R1's /retrieve."""
    with reporting():
        from empg_jax.retrieval.serve import serve_corpus

        prefixes = {"query_prefix": query_prefix, "passage_prefix": passage_prefix}
        found = {"model": model, "cache": vectors, **prefixes}
        if index is not None or encoder is not None:
            found |= {"index": index and str(index), "encoder": encoder}
        try:
            serve_corpus(
                corpus,
                retriever=retriever,
                encoder=None if model is None and "index" not in found else found,
                say=say,
                index_dir=None if index_dir is None else str(index_dir),
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
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    ready_file: ReadyFile = None,
    api_key: ApiKey = None,
    train: Annotated[
        bool, typer.Option("--train", help="Let a client train the policy, by the Tinker API (/api/v1).")
    ] = False,
) -> None:
    """Serve a policy over HTTP, in the languages of OpenAI and vLLM; a signal ends it.

    Routes: GET /health, GET /v1/models, POST /v1/chat/completions, POST /v1/completions, and POST
    /inference/v1/generate (token ids in and out). A conversation keeps its KV: a request that goes on with
    it prefills only what is new (usage.prompt_tokens_details.cached_tokens). return_token_ids=true adds
    token_ids and the field empg: {"version": 2, "entropies", "versions", "logprobs", "sampling_logprobs"}
    with one number per sampled token; entropies and logprobs are those of the whole vocabulary. An option
    that would change the sampling and is not known is refused. With --api-key, weights of the same model are
    taken by POST /update_weights_from_disk, which a run with rollout.engine=openai publishes by.

    With --train one client at a time trains it: TINKER_BASE_URL=http://127.0.0.1:8000 and a TINKER_API_KEY
    that begins with tml- (the value of --api-key, where there is one) point the tinker package here. Losses:
    cross_entropy, importance_sampling, ppo, cispo, and empg:NAME for every algorithm of this project. Saved
    weights go to serve.save_dir. See empg_jax/serve/README.md.

    empg-jax serve runs/NAME --port 8000 serve.slots=32

    curl 127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    with reporting():
        from empg_jax.serve.command import serve_policy

        serve_policy(
            source,
            overrides or [],
            host=host,
            port=port,
            ready_file=ready_file,
            api_key=api_key,
            is_trained=train,
            say=say,
            announce=typer.echo,
        )


@app.command("serve-env")
def serve_env(
    env: Annotated[
        str, typer.Argument(metavar="ENV", help="A name ('empg-jax envs'), or package.module:attribute.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the environment; may be repeated."),
    ] = None,
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    ready_file: ReadyFile = None,
    api_key: ApiKey = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Let other machines (--host) in without a key.")
    ] = False,
    sessions: Annotated[int, typer.Option(min=1, help="Clients at a time; others are turned away.")] = 64,
    idle_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a message after which a session ends.")
    ] = 600.0,
) -> None:
    """Serve an environment to OpenEnv's clients, over WebSocket; a signal ends it.

    Every connection is a session with an environment of its own. An action is {"message": TEXT}; an
    observation has text, info and truncated. A seed names a task: seed % tasks of the first split, from 2^28
    on of the second, and so on; reset also takes split and index. See envs/empg_envs/adapters/README.md.

    empg-jax serve-env household --options level=tiny --port 8000
    """
    with reporting():
        from empg_jax.serve.environments import serve_environment

        serve_environment(
            env,
            options or [],
            host=host,
            port=port,
            ready_file=ready_file,
            api_key=api_key,
            is_open=no_key,
            sessions=sessions,
            idle_timeout=idle_timeout,
            announce=typer.echo,
        )


@app.command()
def chat(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="Folder of a run or checkpoint, Hugging Face folder or hub id, preset or configuration.",
        ),
    ],
    overrides: Overrides = None,
    *,
    entropy: Annotated[bool, typer.Option("--entropy", help="Tell each answer's mean entropy.")] = False,
    system: Annotated[str | None, typer.Option(help="The system's message.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="Sampling temperature; 0 is greedy.")
    ] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the answers (default: drawn).")] = None,
) -> None:
    """Talk to a policy in the terminal, or through a pipe; Ctrl-D ends.

    A model without a chat template goes on with the text that it is given.

    empg-jax chat runs/NAME --entropy

    empg-jax chat Qwen/Qwen2.5-0.5B-Instruct --system "Answer in one word."
    """
    with reporting():
        from empg_jax.serve.chat import chat_with

        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        chat_with(
            source,
            overrides or [],
            options={name: value for name, value in options.items() if value is not None},
            system=system,
            has_entropy=entropy,
            say=say,
            write=lambda piece: typer.echo(piece, nl=False),
        )

"""The one client that trains: its session, its model, and the requests on it in their order.

Everything here runs on the event loop; what takes long is handed to the `Worker`.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import Any

from empg_jax.serve.tinker.codec import Envelope, finite
from empg_jax.serve.tinker.futures import Futures, Line, Pending
from empg_jax.serve.tinker.objectives import find_objective
from empg_jax.serve.tinker.samplers import Samplers
from empg_jax.serve.tinker.store import SAMPLING, TRAINING, Saved, Store
from empg_jax.serve.tinker.trainer import AdamParams, Trainer
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError, refuse

FORGET_SECONDS = 3600  # after which a silent session without a model is forgotten


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds that the server waits.

    Attributes:
      gap: for a request that others wait for.
      session: for a sign of life, before another client may have the model.
    """

    gap: float
    session: float


@dataclasses.dataclass
class Model:
    """The model in training.

    Attributes:
      id: its name on the wire.
      session_id: the session that it belongs to.
      line: the order of its requests.
      broken: why the gradients so far must not be used; None where they may. Used on the worker's thread.
    """

    id: str
    session_id: str
    line: Line
    broken: str | None = None


class Tenant:
    """The training side of the API.

    Args:
      trainer: the model, used on the worker's thread only.
      worker: the thread.
      futures: where results are left.
      samplers: told of weights that are saved for sampling.
      store: saved weights.
      patience: how long to wait for what.
      say: receives messages for the user who started the server.
    """

    def __init__(
        self,
        trainer: Trainer,
        worker: Worker,
        futures: Futures,
        samplers: Samplers,
        store: Store,
        *,
        patience: Patience,
        say: Callable[[str], None],
    ) -> None:
        self._trainer, self._worker, self._futures = trainer, worker, futures
        self._samplers, self._store, self._patience, self._say = samplers, store, patience, say
        self._sessions: dict[str, float] = {}  # id -> time of the last sign of life
        self._finished: set[str] = set()
        self._model: Model | None = None

    # ------------------------------------------------------------------------------------ sessions

    def create_session(self) -> str:
        """Begin a session; return its id."""
        now = time.monotonic()
        kept = None if self._model is None else self._model.session_id
        for session_id, seen in list(self._sessions.items()):
            if now - seen > FORGET_SECONDS and session_id != kept:
                self._end(session_id)
        session_id = f"session-{secrets.token_hex(8)}"
        self._sessions[session_id] = now
        return session_id

    def touch(self, session_id: Any) -> None:
        """Note a sign of life.

        Raises:
          ApiError: there is no such session, or it has ended.
        """
        if not isinstance(session_id, str):
            raise refuse("session_id must be a text", "session_id")
        if session_id in self._finished:
            raise ApiError(410, f"session {session_id} has ended")
        if session_id not in self._sessions:
            raise ApiError(404, f"session {session_id!r} does not exist", param="session_id")
        self._sessions[session_id] = time.monotonic()

    def notice(self, name: str) -> None:
        """Note a sign of life of the session, if there is one, that a request or sampling session is of.

        Args:
          name: its id, which begins with that of its session.
        """
        session_id = name.partition(":")[0]
        if session_id in self._sessions:
            self._sessions[session_id] = time.monotonic()

    def finish_session(self, session_id: str) -> None:
        """End a session and its model.

        Raises:
          ApiError: there is no such session.
        """
        if session_id not in self._finished:
            self.touch(session_id)
            self._end(session_id)

    def _end(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
        self._finished.add(session_id)
        self._samplers.forget(session_id)
        if self._model is not None and self._model.session_id == session_id:
            self._unload(f"session {session_id} has ended")

    # --------------------------------------------------------------------------------------- model

    def create_model(self, session_id: Any, number: Any, rank: int | None, load: Any = None) -> Pending:
        """Take the model into training, from its first weights or from saved ones.

        Args:
          session_id: the session.
          number: of the model in the session.
          rank: of the adapters that the client asks for; None where it does not say.
          load: ``(path, with_optimizer)`` of saved weights; None starts afresh.

        Raises:
          ApiError: there is no such session.
        """
        self.touch(session_id)
        if type(number) is not int:
            raise refuse("model_seq_id is missing", "model_seq_id")
        model_id = f"{session_id}:train:{number}"
        pending, is_new = self._futures.begin(f"{model_id}:create", "create_model")
        if pending.error is not None and pending.error.status == 409:  # the model may be free now
            self._futures.drop(pending)
            pending, is_new = self._futures.begin(pending.id, pending.kind)
        if not is_new:
            return pending
        if (problem := self._taken_by()) is not None:
            self._futures.fail(pending, ApiError(409, problem))
            return pending
        self._unload("another client trains now")
        model = self._model = Model(model_id, session_id, Line(self._patience.gap, self._on_gap))
        self._tell_rank(rank)

        def work() -> dict[str, Any]:
            self._trainer.reset()  # before loading, too: a failure must not leave another client's training
            if load is None:
                return {"type": "create_model", "model_id": model_id}
            return self._load(model, *load)

        finish = self._finisher(pending)

        def done(result: Any, error: ApiError | None) -> None:
            if error is not None and self._model is model:
                self._unload(f"model {model_id} was not created: {error.message}")
            finish(result, error)

        self._worker.submit(work, done)
        return pending

    def _taken_by(self) -> str | None:
        """Say who trains, if a living client does."""
        if self._model is None:
            return None
        silent = time.monotonic() - self._sessions.get(self._model.session_id, 0.0)
        if silent > self._patience.session:
            return None
        return (
            f"this server trains one model at a time, and {self._model.id} is in training; end its session "
            f"(ServiceClient.close), unload it, or wait until its client has been silent for "
            f"{self._patience.session:g} s"
        )

    def _tell_rank(self, rank: int | None) -> None:
        lora = self._trainer.start.model.lora
        own = 0 if lora is None else lora.rank
        if rank and rank != own:
            what = f"adapters of rank {own}" if own else "all weights"
            self._say(
                f"a client asked for adapters of rank {rank}; this server trains {what} "
                f"(model.lora.rank={own}; start it with model.lora.rank={rank} for what the client asked)"
            )

    def unload(self, model_id: Any) -> Pending:
        """End the training of a model; its saved weights stay."""
        pending, is_new = self._futures.begin(f"{model_id}:unload", "unload_model")
        if is_new:
            try:
                self.find(model_id)
            except ApiError:
                self._futures.drop(pending)
                raise
            self._unload(f"model {model_id} was unloaded")
            self._futures.finish(pending, {"type": "unload_model", "model_id": model_id})
        return pending

    def _unload(self, reason: str) -> None:
        if self._model is not None:
            self._model.line.close(ApiError(410, reason))
        self._model = None

    def find(self, model_id: Any) -> Model:
        """Look the model up, which is a sign of life of its session.

        Raises:
          ApiError: it is not in training.
        """
        if self._model is None or self._model.id != model_id:
            now = "none is" if self._model is None else f"{self._model.id} is"
            raise ApiError(404, f"model {model_id!r} is not in training; {now}", param="model_id")
        self._sessions[self._model.session_id] = time.monotonic()
        return self._model

    # ------------------------------------------------------------------------------------ requests

    def run_batch(self, envelope: Envelope) -> Pending:
        """Compute a batch's loss and, unless it is a forward pass only, add its gradient."""

        def work(model: Model) -> Any:
            try:
                longest = self._trainer.limits.max_tokens
                objective = find_objective(envelope.loss_fn, envelope.config, max_tokens=longest)
                return self._trainer.run_batch(envelope.open(), objective, forward_only=envelope.forward_only)
            except Exception as error:
                if not envelope.forward_only:
                    model.broken = f"forward_backward with seq_id={envelope.seq_id} failed ({error})"
                raise

        kind = "forward" if envelope.forward_only else "forward_backward"
        return self._enqueue(envelope.model_id, envelope.seq_id, kind, work)

    def step(self, model_id: Any, seq_id: Any, read: Callable[[], AdamParams]) -> Pending:
        """Make an optimizer step from the gradients since the last one."""

        def work(model: Model) -> Any:
            if model.broken is not None:
                reason, model.broken = model.broken, None
                self._trainer.drop_gradients()
                raise refuse(f"no step was made: {reason}; the gradients before this step were dropped")
            return {"metrics": finite(self._trainer.step(read()))}

        return self._enqueue(model_id, seq_id, "optim_step", work)

    def save(self, model_id: Any, seq_id: Any, name: Any, *, overwrite: bool) -> Pending:
        """Save weights and optimizer under a name."""

        def work(model: Model) -> Any:
            own = name or f"version-{self._trainer.version}"
            params, moments = self._trainer.read(), self._trainer.read_moments()
            saved = Saved(params, moments, self._trainer.version)
            path = self._store.save(model.id, TRAINING, own, saved, overwrite=overwrite)
            return {"type": "save_weights", "path": path}

        return self._enqueue(model_id, seq_id, "save_weights", work)

    def save_for_sampler(self, model_id: Any, seq_id: Any, name: Any, kind: Any) -> Pending:
        """Let weights be sampled from: under a name on disk, or by a sampling session that is returned."""

        def work(model: Model) -> Any:
            if kind not in ("snapshot", "inflight"):
                raise refuse(f"kind={kind!r} must be snapshot or inflight", "kind")
            weights = self._samplers.snapshot()
            if name is None:
                return weights, None
            saved = Saved(weights.read(), None, weights.version)
            return weights, self._store.save(model.id, SAMPLING, name, saved)

        def tell(found: Any) -> dict[str, Any]:
            weights, path = found
            self._samplers.publish(weights)
            answer = {"type": "save_weights_for_sampler", "path": path}
            if path is None:
                session_id = str(model_id).partition(":")[0]
                answer["sampling_session_id"] = self._samplers.open(
                    session_id, None if kind == "inflight" else weights
                )
            return answer

        return self._enqueue(model_id, seq_id, "save_weights_for_sampler", work, tell)

    def load(self, model_id: Any, seq_id: Any, path: Any, *, with_optimizer: bool) -> Pending:
        """Go on from saved weights."""
        return self._enqueue(
            model_id, seq_id, "load_weights", lambda model: self._load(model, path, with_optimizer)
        )

    def _load(self, model: Model, path: Any, with_optimizer: bool) -> dict[str, Any]:
        moments = self._store.load_moments(path) if with_optimizer else None
        self._trainer.load(self._store.load(path), moments)
        model.broken = None
        return {"type": "load_weights", "path": path, "model_id": model.id}

    def _enqueue(
        self,
        model_id: Any,
        seq_id: Any,
        kind: str,
        work: Callable[[Model], Any],
        tell: Callable[[Any], Any] = lambda result: result,
    ) -> Pending:
        """Put work on the model in its line.

        Raises:
          ApiError: the model is not in training, or the number cannot be.
        """
        model = self.find(model_id)
        if type(seq_id) is not int or seq_id < 1:
            raise refuse(f"seq_id={seq_id!r} must be an integer from 1", "seq_id")
        pending, is_new = self._futures.begin(f"{model.id}:{seq_id}", kind)
        if is_new:
            finish = self._finisher(pending, tell)
            try:
                model.line.arrive(
                    seq_id,
                    lambda: self._worker.submit(lambda: work(model), finish),
                    lambda error: self._futures.fail(pending, error),
                )
            except ApiError as error:
                self._futures.fail(pending, error)
        return pending

    def _finisher(
        self, pending: Pending, tell: Callable[[Any], Any] = lambda result: result
    ) -> Callable[[Any, ApiError | None], None]:
        def done(result: Any, error: ApiError | None) -> None:
            if error is not None:
                self._futures.fail(pending, error)
            else:
                self._futures.finish(pending, tell(result))

        return done

    def _on_gap(self, missing: range) -> None:
        """A request never arrived: nobody knows what the gradients lack."""
        model = self._model
        if model is not None:
            reason = f"seq_id {missing[0]} never arrived"
            self._worker.submit(lambda: setattr(model, "broken", reason), lambda result, error: None)

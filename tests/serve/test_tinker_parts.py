"""The parts of the training API, without HTTP: gradients, rows, numbers of the losses, and the order."""

import asyncio
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_tinker import datum

from empg_jax import serve
from empg_jax.algorithms.recipes import RECIPES
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.learner.state import init_trained
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.lora import LoraConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.serve.policy import Start
from empg_jax.serve.tinker.codec import BatchResult, Datum, encode_batch, read_json, read_proto
from empg_jax.serve.tinker.futures import GRACE_SECONDS, Futures, Line
from empg_jax.serve.tinker.objectives import find_objective
from empg_jax.serve.tinker.proto import message
from empg_jax.serve.tinker.routes import _read_adam
from empg_jax.serve.tinker.rows import Limits, make_rows
from empg_jax.serve.tinker.store import Saved, Store
from empg_jax.serve.tinker.trainer import MOST_PROGRAMS, AdamParams, Trainer
from empg_jax.serve.wire import ApiError
from empg_jax.types import Scores
from tests.serve.protos import as_proto

MODEL = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=16,
)
MESH = make_mesh(devices=jax.local_devices()[:1])
LIMITS = Limits(vocab_size=32, max_tokens=32, micro_tokens=64, mesh=MESH)
RNG = np.random.default_rng(0)


def make_data(*lengths, **inputs):
    data = []
    for length in lengths:
        row = RNG.integers(0, 32, length + 1)
        given = {name: make(length) for name, make in inputs.items()}
        data.append(Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], **given}))
    return data


def numbers(low, high):
    return lambda length: RNG.uniform(low, high, length).astype(np.float32)


def pad(data):
    """The rows of datums side by side, and the mask of their targets."""
    rows = [np.append(d.tokens, d.inputs["target_tokens"][-1:]) for d in data]
    width = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    segments = (positions < np.array([[len(row)] for row in rows])).astype(np.int32)
    return tuple(map(jnp.asarray, (tokens, positions, segments)))


def spread(data, name):
    """An input of datums beside their rows; 0 elsewhere."""
    width = max(len(d.tokens) for d in data)
    values = [np.pad(d.inputs[name], (1, width - len(d.tokens))) for d in data]
    return jnp.asarray(np.stack(values).astype(np.float32))


def check_gradient(trainer, loss_of, data, objective):
    """Two requests add up to the gradient of the loss of both."""

    def whole(params):
        logprobs = compute_logprobs(params, MODEL, *pad(data))[0]
        return loss_of(logprobs), logprobs

    params = jax.tree.map(jnp.asarray, trainer.read())
    (expected, logprobs), gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    parts = [trainer.run_batch(part, objective, forward_only=False) for part in (data[:2], data[2:])]
    assert sum(part.metrics["loss:sum"] for part in parts) == pytest.approx(float(expected), rel=1e-5)
    outputs = [output["logprobs"] for part in parts for output in part.outputs]
    for output, row in zip(outputs, np.asarray(logprobs), strict=True):
        np.testing.assert_allclose(output, row[1 : len(output) + 1], atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), trainer._state.opt_state, gradient)
    return params, gradient


@pytest.fixture(scope="module")
def trainer():
    params = jax.device_get(jax.jit(functools.partial(init_params, config=MODEL))(jax.random.key(0)))
    return Trainer(Start(MODEL, MESH, params, None), LIMITS)


@pytest.mark.slow
def test_the_gradient_is_that_of_cross_entropy_and_adam_is_torchs(trainer):
    data = make_data(5, 9, 3, 20, weights=numbers(0, 2))
    params, gradient = check_gradient(
        trainer,
        lambda logprobs: -jnp.sum(spread(data, "weights") * logprobs),
        data,
        find_objective("cross_entropy", {}),
    )
    metrics = trainer.step(AdamParams(learning_rate=0.01, beta2=0.95, weight_decay=0.1, grad_clip_norm=0.5))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # AdamW's first step in closed form: the moments are the clipped gradient and its square.
    for found, before, leaf in zip(
        jax.tree.leaves(trainer.read()), jax.tree.leaves(params), leaves, strict=True
    ):
        before, clipped = np.asarray(before), leaf * (0.5 / (norm + 1e-6))
        expected = before - 0.01 * (clipped / (np.abs(clipped) + 1e-12) + 0.1 * before)
        clear = np.abs(clipped) > 1e-5  # else the direction is one of rounding errors
        np.testing.assert_allclose(found[clear], expected[clear], atol=1e-4)
    trainer.run_batch(data, find_objective("cross_entropy", {}), forward_only=False)
    trainer.drop_gradients()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(trainer._state.opt_state))
    with pytest.raises(ApiError, match="there is no gradient"):
        trainer.step(AdamParams())


def test_programs_of_other_settings_do_not_pile_up(trainer):
    usual = trainer._compiled(find_objective("cross_entropy", {}), 1)
    for step in range(2 * MOST_PROGRAMS):
        trainer._compiled(find_objective("ppo", {"clip_high_threshold": 1.2 + step}), 1)
        assert trainer._compiled(find_objective("cross_entropy", {}), 1) is usual
    assert len(trainer._programs) == MOST_PROGRAMS


def test_weights_of_another_type_are_refused(trainer, tmp_path):
    params = trainer.read()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    moments = trainer.read_moments()
    path = Store(tmp_path, "m", half).save("s:train:0", "weights", "half", Saved(half, moments, 1))
    store = Store(tmp_path, "m", params)
    with pytest.raises(ApiError, match="is bfloat16, not float32, as a server with another"):
        store.load(path)
    jax.tree.map(np.testing.assert_array_equal, Store(tmp_path, "m", half).load(path), half)
    assert store.load_moments(path).count == moments.count


@pytest.mark.slow
def test_the_gradient_is_that_of_importance_sampling(trainer):
    trainer.reset()
    data = make_data(5, 9, 3, 20, logprobs=numbers(-4, -3), advantages=numbers(-1, 1))

    def loss(logprobs):
        ratios = jnp.exp(logprobs - spread(data, "logprobs"))
        return -jnp.sum(spread(data, "advantages") * ratios)

    check_gradient(trainer, loss, data, find_objective("importance_sampling", {}))


@pytest.mark.slow
def test_adapters_are_trained_over_a_frozen_base():
    model = DecoderConfig(**{**vars(MODEL), "lora": LoraConfig(4)})
    base = init_params(jax.random.key(0), MODEL)
    first = jax.device_get(init_trained(jax.random.key(1), model))
    before = jax.device_get(base)
    trainer = Trainer(Start(model, MESH, first, base), LIMITS)
    objective, data = find_objective("cross_entropy", {}), make_data(5, 9)
    losses = []
    for _ in range(4):
        result = trainer.run_batch(data, objective, forward_only=False)
        losses.append(result.metrics["loss:sum"])
        trainer.step(AdamParams(learning_rate=0.05))
    assert losses[-1] < losses[0] - 1
    assert jax.tree.structure(trainer.read()) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.start.base), before)


@pytest.mark.parametrize("name", ["ppo", "cispo"])
@pytest.mark.parametrize("config", [{}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}])
def test_clipped_losses_are_those_of_the_official_definition(name, config):
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    old, new, advantages = numbers(-2, 0)(64), numbers(-2, 0)(64), numbers(-1, 1)(64)
    rows = make_rows(make_data(31), find_objective("cross_entropy", {}), LIMITS).batch
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), rows)
    length = rows.loss_mask.shape[1]
    old, new, advantages = (jnp.asarray(values[:length][None]) for values in (old, new, advantages))
    objective = find_objective(name, config)

    def loss(new):
        scores = Scores(old, old, old)
        values, _ = objective.algorithm.loss(new, new, rows, scores, advantages)
        return jnp.sum(values)

    def defined(new):
        ratio = jnp.exp(new - old)
        clipped = jnp.clip(ratio, low, high)
        if name == "ppo":
            values = jnp.minimum(ratio * advantages, clipped * advantages)
        else:
            values = jax.lax.stop_gradient(clipped) * new * advantages
        return -jnp.sum(jnp.where(rows.loss_mask, values, jnp.float32(0.0)))

    for found, expected in zip(jax.value_and_grad(loss)(new), jax.value_and_grad(defined)(new), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_settings_of_our_algorithms_are_read_from_numbers_and_texts():
    config = {
        "empg.zeta": 0.5,
        "empg.shuffle_seed": 3.0,
        "aggregation": "seq-mean-token-mean",
        "clip_high": 1,
    }
    objective = find_objective("empg:grpo_empg", config)
    found = dict(objective.settings)
    assert found["empg.shuffle_seed"] == 3 and type(found["empg.shuffle_seed"]) is int
    assert dict(find_objective("empg:grpo", {"scale_by_std": 0.0}).settings) == {"scale_by_std": False}
    assert dict(find_objective("empg:grpo", {"invalid_penalty": 0.1}).settings) == {"invalid_penalty": 0.1}
    assert find_objective("empg:reinforce_pp", {}).needs_reference
    for config, text in (
        ({"empg.zetta": 1}, "did you mean 'zeta'"),
        ({"ratio_unit": "turn"}, "has no effect"),
        ({"clip_high": -5}, "clip_high=-5.0: must be greater than 0"),
        ({"clip_high": float("nan")}, "clip_high=nan must be a finite number"),
        ({"clip_high": 10**400}, "clip_high=1000"),
    ):
        with pytest.raises(ApiError, match=text):
            find_objective("empg:grpo_empg", config)
    with pytest.raises(ApiError, match="must be a finite number"):
        find_objective("ppo", {"clip_high_threshold": 10**400})
    for value in ("1.5", 10**400):
        with pytest.raises(ApiError, match=r"learning_rate=.*must be a number"):
            _read_adam({"adam_params": {"learning_rate": value}})


@pytest.mark.parametrize(
    "data, dtype, is_read",
    [
        ([66, 5], "int64", True),
        ([], "int64", True),
        ([66.7, 5], "int64", False),
        (["5"], "int64", False),
        ([2**63], "int64", False),
        ([1, 0.5], "float32", True),
        (["0.5"], "float32", False),
        ([[1], [1, 2]], "float32", False),
        ([None], "float32", False),
    ],
)
def test_tensors_in_json_hold_numbers_of_their_type(data, dtype, is_read):
    example = datum([65, 66])
    example["loss_fn_inputs"]["x"] = {"data": data, "dtype": dtype}
    asked = {"data": [example], "loss_fn": "cross_entropy"}
    envelope = read_json({"model_id": "m", "seq_id": 1, "forward_backward_input": asked})
    if is_read:
        assert envelope.open()[0].inputs["x"].tolist() == data
    else:
        with pytest.raises(ApiError, match="datum 0: x: data must be a list of"):
            envelope.open()


def make_turns(spans, group, tokens=None, **inputs):
    (example,) = make_data(12, logprobs=numbers(-1, 0))
    tokens = example.tokens if tokens is None else tokens
    given = {
        "turns": np.array(spans),
        "rewards": np.arange(len(spans), dtype=np.float32),
        "group": np.array([group]),
        **{name: np.array(values) for name, values in inputs.items()},
    }
    return Datum(tokens, {**example.inputs, "target_tokens": np.append(tokens[1:], 7), **given})


def test_turns_of_datums_become_trajectories():
    objective = find_objective("empg:gigpo", {})
    first = make_turns([[2, 4], [6, 9]], 5, trajectory=[0])
    # A history that was rewritten is a row of its own, of the same trajectory.
    later = make_turns([[3, 5]], 5, trajectory=[0], anchors=[77])
    other = make_turns([[0, 12]], 5, trajectory=[1])
    rows = make_rows([first, other, later], objective, LIMITS)
    batch = rows.batch
    assert batch.trajectory_mask.sum() == 2 and rows.groups == {5}
    assert batch.group_ids[:2].tolist() == [0, 0]
    assert batch.turn_rewards[0, :3].tolist() == [0, 1, 0] and batch.returns[:2].tolist() == [1, 0]
    assert batch.loss_mask.sum() == 2 + 3 + 2 + 12 and rows.layout.num_segments == 3
    assert len(set(batch.anchor_ids[0, :3].tolist())) == 3
    # Numbers per target go to their tokens and come back.
    sent = [d.inputs["logprobs"] for d in (first, other, later)]
    np.testing.assert_array_equal(
        rows.spread(sent)[batch.loss_mask], batch.behavior_logprobs[batch.loss_mask]
    )
    back = rows.gather(batch.behavior_logprobs)
    for example, found in zip((first, other, later), back, strict=True):
        inside = np.zeros(12, bool)
        for start, stop in example.inputs["turns"]:
            inside[start:stop] = True
        np.testing.assert_array_equal(found, np.where(inside, example.inputs["logprobs"], 0))
    targets = rows.gather(batch.tokens.astype(np.float32))
    np.testing.assert_array_equal(targets[1], other.inputs["target_tokens"])


def make_episodes(**inputs):
    """Two attempts at one task: the first wins in two turns, the second loses."""
    spans, given = [[2, 4], [6, 9]], {"anchors": [1, 2], "actions": [7, 8], **inputs}
    won = make_turns(spans, 5, success=[1], milestones=[0, 1], valid=[1, 1], **given)
    lost = make_turns(spans, 5, success=[0], milestones=[0, 0], valid=[1, 0], **given)
    return [won, lost]


def credit_of(objective, data):
    """The advantages of turns, from the episodes of a request."""
    batch = make_rows(data, objective, LIMITS).batch
    scores = Scores(batch.behavior_logprobs, batch.behavior_logprobs * 0 + 1, batch.behavior_logprobs)
    return batch, objective.algorithm.credit(batch, scores)


@pytest.mark.slow
def test_requests_tell_success_actions_milestones_and_invalid_turns():
    batch, credit = credit_of(find_objective("empg:graft", {}), make_episodes(rewards=[0.0, 0.0]))
    assert batch.success[:2].tolist() == [True, False] and batch.turn_valid[1, :2].tolist() == [True, False]
    assert (
        batch.milestones[0, :2].tolist() == [False, True] and batch.action_ids[0, 0] == batch.action_ids[1, 0]
    )
    # Equal first moves have credit of the other's end alone; the second ones lead to goal and failure.
    paid = np.asarray(credit.turns.advantages)[:2, :2]
    assert paid[0, 1] > 0 > paid[1, 1]
    paid = np.asarray(credit_of(find_objective("empg:beacon", {}), make_episodes())[1].turns.advantages)
    assert paid[0, 0] > paid[1, 0]
    costly = find_objective("empg:grpo", {"invalid_penalty": 0.5, "scale_by_std": 0})
    paid = np.asarray(credit_of(costly, make_episodes())[1].turns.advantages)
    np.testing.assert_allclose(paid[:2, 0], [0.25, -0.25], atol=1e-6)
    # Without numbers equal responses are equal actions.
    same = make_turns([[2, 4], [6, 9]], 5, success=[1])
    batch = make_rows([same, Datum(same.tokens, same.inputs)], find_objective("empg:crbc", {}), LIMITS).batch
    assert batch.action_ids[0, :2].tolist() == batch.action_ids[1, :2].tolist()


def test_a_constant_divisor_does_not_depend_on_the_longest_datum():
    objective = find_objective("empg:dr_grpo", {}, max_tokens=32)
    weights = []
    for length in (12, 30):
        data = [make_turns([[2, 4]], 5), make_turns([[2, 4]], 5)]
        (longer,) = make_data(length, logprobs=numbers(-1, 0))
        data[1] = Datum(longer.tokens, {**data[1].inputs, **longer.inputs})
        weights.append(np.asarray(credit_of(objective, data)[1].loss_weights).max())
    np.testing.assert_allclose(weights, 1 / 2 / 32, rtol=1e-6)


def test_what_would_do_nothing_is_refused():
    with pytest.raises(ApiError, match=r"datum 0: success is missing; empg:crbc needs .*success"):
        make_rows([make_turns([[2, 4]], 5)], find_objective("empg:crbc", {}), LIMITS)
    with pytest.raises(ApiError, match="milestones is missing"):
        make_rows([make_turns([[2, 4]], 5)], find_objective("empg:beacon_aem", {}), LIMITS)
    for config in (
        {"correction.kind": "tis"},
        {"correction.kind": "mis"},
        {"loss": "decoupled_ppo"},
        {"correction.sequence_delta": 0.1, "correction.sequence_logprobs": "learner"},
    ):
        with pytest.raises(ApiError, match="compares learner and sampler"):
            find_objective("empg:grpo", config)
    find_objective("empg:grpo", {"correction.sequence_delta": 0.1})
    for name, config in (("grpo", {"mask_truncated": "turn"}), ("gigpo", {"anchor_similarity": 0.9})):
        with pytest.raises(ApiError, match="has no effect here"):
            find_objective(f"empg:{name}", config)


def test_the_page_lists_the_algorithms_that_are_refused():
    refused = set()
    for name in RECIPES:
        try:
            find_objective(f"empg:{name}", {})
        except ApiError as error:
            refused.add(name)
            assert "critic" in str(error) or "answers" in str(error)
    assert refused == {"ppo", "turn_ppo", "igpo", "a2tgpo"}
    page = (Path(serve.__file__).parent / "README.md").read_text()
    assert "all but those\nwith a critic, and `igpo` and `a2tgpo`" in page


def test_a_batch_reads_the_same_in_protobuf_and_in_json():
    data = [datum([1, 2, 3], advantages=[0.5, 1.0], turns=[[0, 2]]), datum([4, 5])]
    asked = {"data": data, "loss_fn": "ppo", "loss_fn_config": {}}
    of_json = read_json({"model_id": "m", "seq_id": 7, "forward_backward_input": asked})
    of_proto = read_proto(as_proto("m", 7, data, "ppo"))
    assert (of_json.model_id, of_json.seq_id, of_json.loss_fn) == ("m", 7, "ppo")
    assert (of_proto.model_id, of_proto.seq_id, of_proto.loss_fn) == ("m", 7, "ppo")
    for one, other in zip(of_json.open(), of_proto.open(), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.inputs.keys() == other.inputs.keys()
        for name, values in one.inputs.items():
            np.testing.assert_array_equal(values, other.inputs[name])
    outputs = [{"logprobs": np.float32([1, 2])}, {"logprobs": np.float32([3])}]
    answer = message("ForwardBackwardOutput")
    answer.ParseFromString(encode_batch(BatchResult(outputs, {"loss:sum": 2.5})))
    field = answer.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(field.offsets, np.int64).tolist() == [0, 8, 12]
    assert np.frombuffer(field.data, np.float32).tolist() == [1, 2, 3]
    assert dict(answer.metrics) == {"loss:sum": 2.5} and answer.loss_fn_outputs[0].num_datums == 2
    broken = message("ForwardBackwardRequest")
    broken.data.add().loss_fn_inputs["x"].dense = b"123"
    broken.data[0].loss_fn_inputs["x"].dtype = 1
    with pytest.raises(ApiError, match="datum 0: x: 3 bytes are no whole number of float32"):
        read_proto(broken.SerializeToString()).open()


def test_requests_are_released_in_order_and_gaps_are_told():
    async def play():
        released, failed, gaps = [], {}, []
        line = Line(0.01, gaps.append)

        def arrive(number):
            line.arrive(
                number,
                lambda: released.append(number),
                lambda error: failed.setdefault(number, error.message),
            )

        for number in (3, 2):
            arrive(number)
        assert not released
        arrive(1)
        assert released == [1, 2, 3]
        arrive(6)
        while not failed:
            await asyncio.sleep(0.005)
        assert failed[6].startswith("seq_id=6 waited 0.01 s for seq_id 4 to 5") and gaps == [range(4, 6)]
        with pytest.raises(ApiError, match="seq_id=5 comes too late: the next is 7"):
            arrive(5)
        arrive(8)
        line.close(ApiError(410, "the end"))
        assert failed[8] == "the end"
        arrive(7)
        assert released == [1, 2, 3, 7]

    asyncio.run(play())


def test_only_the_newest_results_are_kept():
    async def play():
        futures = Futures(keep=2)
        for number in range(3):
            pending, is_new = futures.begin(f"m:{number}", "optim_step")
            assert is_new and not await futures.wait(pending, 0)
            futures.finish(pending, number)
            assert await futures.wait(pending, 60)
        assert futures.find("m:2").result == 2
        with pytest.raises(ApiError, match="no longer kept") as caught:
            futures.find("m:0")
        assert caught.value.status == 410  # which makes the client send the request again
        with pytest.raises(ApiError, match="belongs to optim_step, not to forward"):
            futures.begin("m:2", "forward")

    asyncio.run(play())


def test_results_that_were_told_are_forgotten_after_a_grace():
    async def play():
        now = [0.0]
        futures = Futures(clock=lambda: now[0])
        first, second = (futures.begin(f"m:{number}", "optim_step")[0] for number in (1, 2))
        for pending in (first, second):
            futures.finish(pending, pending.id)
        futures.note_told(first)
        now[0] = GRACE_SECONDS - 1
        futures.note_told(first)  # asking again does not keep it longer
        futures.begin("m:3", "optim_step")
        assert futures.find("m:1") is first
        now[0] = GRACE_SECONDS + 1
        futures.begin("m:4", "optim_step")
        with pytest.raises(ApiError, match="no longer kept"):
            futures.find("m:1")
        assert futures.find("m:2") is second  # nobody has asked for it

    asyncio.run(play())

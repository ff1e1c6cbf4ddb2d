"""Combinations that cannot work where a server samples the episodes (``rollout.engine=openai``)."""

from __future__ import annotations

from collections.abc import Iterator

from empg_jax.config.hosts import HostsConfig
from empg_jax.config.lag import SERVER
from empg_jax.config.sections import RolloutConfig

# Keys of the engine in this program, at values that mean nothing. Its burst and its buckets are left alone:
# files set them for speed.
_BUILTIN = {
    **{"data": 1, "tensor": 1, "devices": None, "release": False, "share_prefix": True},
    **{"page_tokens": None, "kv_tokens": None},
}
_SERVER = ("url", "weights_dir", "request_timeout")


def server_problems(rollout: RolloutConfig, hosts: HostsConfig) -> Iterator[str]:
    """Yield what is wrong."""
    if rollout.engine == "builtin":
        for key in _SERVER:
            if (value := getattr(rollout, key)) != RolloutConfig.model_fields[key].default:
                yield f"rollout.{key}={value} has no effect with rollout.engine=builtin: set {SERVER}"
        return
    if rollout.url is None:
        yield f"{SERVER} needs the server's address, for example rollout.url=http://127.0.0.1:8000"
    for key, neutral in _BUILTIN.items():
        if (value := getattr(rollout, key)) != neutral:
            yield f"rollout.{key}={value} has no effect with {SERVER}: no engine runs in this program"
    if rollout.publish == "burst":
        yield f"rollout.publish=burst with {SERVER}: a server gets weights between responses only; use turn"
    if rollout.deterministic:
        yield (
            f"rollout.deterministic=true with {SERVER}: another program rounds in its own way; "
            "use rollout.engine=builtin"
        )
    if rollout.stored is not None:
        yield f"rollout.stored={rollout.stored} with {SERVER}: nothing is sampled; use rollout.engine=builtin"
    if (hosts.num or 1) > 1:
        yield f"hosts.num={hosts.num} with {SERVER}: a server samples for one host"

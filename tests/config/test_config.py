"""The configuration: what is accepted, and that each refusal says where, what, and what would be right."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from empg_jax.algorithms.advantages import SINGLETONS
from empg_jax.algorithms.aggregation import AGGREGATIONS, SCALED_MODES
from empg_jax.algorithms.configure import spec_of
from empg_jax.algorithms.corrections import LEVELS
from empg_jax.algorithms.keys import flatten, key_of, read_keys, spelled
from empg_jax.algorithms.losses import KL_KINDS
from empg_jax.algorithms.modulation import CENTERS, MEANS, SCOPES
from empg_jax.algorithms.recipes import ALGORITHMS
from empg_jax.algorithms.signatures import FACTORIES
from empg_jax.algorithms.surrogates import STALE_MODES
from empg_jax.config import Config, check_resumable, describe, load_config
from empg_jax.config.algorithm import (
    ALGORITHM_NAMES,
    AemConfig,
    AlgorithmConfig,
    CorrectionConfig,
    EmpgConfig,
    flat_defaults,
)
from empg_jax.config.load import check_unchanged
from empg_jax.errors import ConfigError
from empg_jax.run.assembly import make_recipe_from

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# Overrides of the quickstart, and what its refusal must say.
REFUSED = {
    (
        "train.learnign_rate=1",
    ): r"train\.learnign_rate=1: unknown key \(did you mean train\.learning_rate\?\)",
    ("group_size=3",): r"group_size=3: unknown key \(did you mean rollout\.group_size\?\)",
    ("algorithm.empg.zetta=3",): r"did you mean algorithm\.empg\.zeta\?",
    ("qwertyuiop=1",): r"qwertyuiop=1: unknown key; the keys here are .*rollout",
    ("rollout.group_size=abc",): r"rollout\.group_size='abc': must be a valid integer",
    ("train.updates=true",): r"train\.updates=True: must be a valid integer",
    ("train.updates=1.5",): r"train\.updates=1\.5: must be a valid integer",
    ("train.updates=-1",): r"train\.updates=-1: must be greater than or equal to 0",
    ("rollout.temperature=0",): r"rollout\.temperature=0: must be greater than 0",
    ("rollout.temperature=.nan",): r"rollout\.temperature=nan: must be a finite number",
    ("run_dir=3",): r"run_dir=3: must be a valid string",
    ("train=3",): r"train=3: this is a section; its keys are updates",
    ("algorithm.modulation=emgp",): r"did you mean empg\?\); choose none or empg or aem",
    ("algorithm.name=gpro",): r"algorithm\.name=gpro is unknown \(did you mean grpo\?\)",
    (
        "algorithm.name=null",
        "algorithm.entry_point=evil",
    ): r"algorithm\.entry_point='evil': expected module:RECIPE, such as mine:RECIPE",
    ("algorithm.name=grpoo",): r"algorithm\.name=grpoo is unknown \(did you mean grpo\?\)",
    (
        "algorithm.name=grpo_empg",
        "algorithm.modulation=aem",
    ): r"grpo_empg and algorithm\.modulation=aem name two",
    ("rollout.group_size=1",): r"rollout\.group_size=1 with algorithm\.name=grpo",
    ("rollout.group_size=1", "algorithm.name=rloo"): r"rollout\.group_size=1 with algorithm\.name=rloo",
    ("rollout.min_group_size=9",): r"min_group_size=9 must lie between 2 and rollout\.group_size=8",
    ("model.path=a", "model.preset=b"): r"model\.path=a and model\.preset=b exclude each other",
    ("model.num_kv_heads=3",): r"model\.num_kv_heads=3 must divide model\.num_heads=4",
    ("model.hidden_size=66",): r"model\.num_heads=4 must divide model\.hidden_size=66",
    ("env.name=null",): r"env\.name=null and env\.entry_point=null",
    ("env.entry_point=a.b:C",): r"env\.name=household and env\.entry_point=a\.b:C exclude each other",
    ("env.name=null", "env.entry_point=nonsense"): r"env\.entry_point='nonsense'",
    (
        "rollout.max_response_tokens=256",
    ): r"max_response_tokens=256 must be smaller than rollout\.max_tokens=256",
    ("rollout.prefill_buckets=[8,4]",): r"rollout\.prefill_buckets=\[8, 4\] must be ascending",
    ("rollout.prefill_buckets=[8,x]",): r"rollout\.prefill_buckets='x': must be a valid integer",
    ("rollout.prefill_buckets=[512]",): r"reaches beyond rollout\.max_tokens=256",
    ("mesh.data=2",): r"mesh\.data=2 x mesh\.fsdp=1 cannot divide: use train\.micro_tokens=1024",
    ("train.micro_tokens=100",): r"train\.micro_tokens=100 holds 0 rows .* use train\.micro_tokens=256",
    ("run_dir=gs://bucket/run",): r"run_dir=gs://bucket/run is an object store; a run needs a folder",
    ("checkpoint.dir=s3://bucket/run",): r"dir=s3://bucket/run is an object store that orbax cannot write",
    ("checkpoint.dir=gs://bucket/",): r"dir=gs://bucket/ must name a folder in a bucket: gs://BUCKET/FOLDER",
    ("mesh.sequence=3",): r"mesh\.sequence=3 must divide rollout\.max_tokens=256",
    ("train.share_prefix=true", "mesh.sequence=2"): r"train\.share_prefix=true with mesh\.sequence=2",
    ("rollout.kv_tokens=512",): r"rollout\.kv_tokens=512 has no effect without rollout\.page_tokens",
    (
        "rollout.page_tokens=48",
        "rollout.kv_tokens=256",
    ): "in pages of rollout.page_tokens=48: .* 288",
    ("rollout.page_tokens=16", "rollout.data=2"): r"rollout\.page_tokens=16 with rollout\.data=2",
    ("mesh.tensor=3",): r"mesh\.tensor=3 must divide model\.num_heads=4",
    ("train.num_minibatches=129",): r"train\.num_minibatches=129 is more than the 128 episodes",
    ("train.warmup_updates=181",): r"train\.warmup_updates=181 exceeds train\.updates=180",
    ("algorithm.entropy_source=engine", "train.max_lag=1"): r"entropy_source=engine .*train\.max_lag=1",
    ("algorithm.omega=2",): r"algorithm\.omega=2.* no effect with algorithm\.name=grpo: it belongs to gigpo",
    ("algorithm.correction.cap=3",): r"correction\.cap=3.* no effect with algorithm\.correction\.kind=none",
    ("algorithm.correction.stale_cap=3",): r"stale_cap=3.* belongs to decoupled_ppo",
    ("algorithm.correction.knd=tis",): r"did you mean algorithm\.correction\.kind\?",
    ("algorithm.correction.kind=tis",): r"correction\.kind=tis compares .*entropy_source=learner",
    (
        "algorithm.correction={kind: tis}",
        "algorithm.loss=decoupled_ppo",
    ): r"kind=tis with algorithm\.loss=decoupled_ppo",
    ("algorithm.correction={kind: mis, low: 3}",): r"correction\.low=3.* must not exceed .*high=2",
    ("algorithm.name=reinforce_pp", "algorithm.kl_coef=0.1"): r"kl_coef=0\.1 and .*reward_kl_coef=0\.001",
    ("algorithm.overlong_length=9",): r"overlong_length and algorithm\.overlong_cache are set together",
    (
        "algorithm.overlong_length=9",
        "algorithm.overlong_cache=10",
    ): r"overlong_cache=10 must not exceed .*overlong_length=9",
    (
        "rollout.group_size=1",
        "algorithm.name=reinforce",
        "rollout.filter_groups=true",
    ): r"rollout\.filter_groups=true compares .* rollout\.group_size=1",
    (
        "env.sampler=adaptive",
        "rollout.stored=a.npz",
    ): r"sampler=adaptive has no effect with rollout\.stored=a",
    ("rollout.max_refills=3",): r"max_refills=3 has no effect with rollout\.filter_groups=false",
    ("foo",): r"override 'foo' is not of the form section\.key=value",
    (".x=1",): r"override '\.x=1' is not of the form",
    ("seed.x=3",): r"seed=\{'x': 3\}: must be a valid integer",
    ("train.updates=1", "train.updates.x=3"): r"train\.updates is 1 and has no keys below it",
    ("train.updates=[1",): r"override 'train\.updates=\[1': the value is not valid YAML",
    ("env.options={a: 1, a: 2}",): r"the key 'a' comes twice",
    ("env.options={[a]: 1}",): r"the key \['a'\] is no text",
    ("model.hidden_size=12",): r"model\.hidden_size / model\.num_heads=3 must be even",
    ("model.head_dim=7",): r"model\.head_dim=7 must be even",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_each_mistake_is_one_message_that_names_key_value_and_remedy(overrides):
    with pytest.raises(ConfigError, match=re.compile(REFUSED[overrides], re.S)) as caught:
        load_config("quickstart", overrides)
    assert "pydantic" not in str(caught.value).lower()


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", ["train.updates=x", "seed=-1", "algorithm.nam=grpo"])
    assert all(key in str(caught.value) for key in ("train.updates", "seed", "algorithm.nam"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "is not valid YAML: line 1"),
        ("train: {updates: 1}\ntrain: {epochs: 1}\n", "line 2: the key 'train' comes twice"),
        ("- 1\n", "must hold keys and values"),
        ("", "bad.yaml is empty; a file without keys of its own holds {}"),
        ("# train: {updates: 1}\n", "bad.yaml is empty; "),
        ("1: 2\n", "the key 1 is no text"),
        ("? [a, b]\n: 3\n", r"the key ['a', 'b'] is no text"),
        ("train: {{ updates }}\n", "the key {'updates': None} is no text"),
        ("\x00", "not valid YAML"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "bad.yaml")


def test_missing_files_are_named():
    with pytest.raises(ConfigError, match=r"quickstat.*did you mean quickstart\?"):
        load_config("quickstat")
    with pytest.raises(ConfigError, match=r"no configuration file .*nope\.yaml"):
        load_config("nope.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_packaged_configs_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path.stem)
    assert config.name == path.stem
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_a_config_with_nothing_in_it_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("{}  # nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config(name="empty")


def test_texts_that_look_like_numbers_survive_a_round_trip(tmp_path):
    own = ["name='1e3'", "log.tags=['1e-4', '3:20', '0x1F', 'on']", "env.options={level: tiny, style: '2E5'}"]
    config = load_config("quickstart", own)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "config.yaml")
    assert again == config and again.name == "1e3" and again.env.options["style"] == "2E5"


def test_overrides_are_yaml_and_the_last_one_wins():
    config = load_config(
        "quickstart",
        ["train.learning_rate=1e-4", "seed=1", "seed=2", "env.options.level=easy", "algorithm.dual_clip=null",
         "algorithm={empg: {k: 2}}", "rollout.prefill_buckets=[8, 16]"],
    )  # fmt: skip
    assert (config.train.learning_rate, config.seed, config.algorithm.dual_clip) == (1e-4, 2, None)
    assert config.env.options == {"level": "easy", "style": "terse"}
    assert config.algorithm.empg.k == 2 and config.algorithm.empg.zeta == 0.05
    assert config.rollout.prefill_buckets == (8, 16)


def test_recipes_are_written_out():
    empg = load_config("quickstart", ["algorithm.modulation=empg", "algorithm.name=dapo_empg"]).algorithm
    assert (empg.name, empg.modulation, empg.clip_high) == ("dapo", "empg", 0.28)
    mean_only = load_config("quickstart", ["algorithm.name=dr_grpo"]).algorithm
    assert (mean_only.name, mean_only.scale_by_std) == ("dr_grpo", False)
    assert Config(algorithm={"name": "dr_grpo", "scale_by_std": True}).algorithm.scale_by_std


def test_dapo_samples_dynamically_unless_told_otherwise():
    assert not load_config("quickstart").rollout.filter_groups
    for name in ("dapo", "dapo_aem"):
        overrides = ["algorithm.modulation=none"] if name == "dapo" else ["algorithm.modulation=aem"]
        assert load_config("quickstart", [f"algorithm.name={name}", *overrides]).rollout.filter_groups
    off = load_config("quickstart", ["algorithm.name=dapo", "rollout.filter_groups=false"])
    assert not off.rollout.filter_groups


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.updates = 3


def test_every_key_has_one_sentence():
    keys = describe()
    assert len(keys) == len({path for path, _, _ in keys}) > 80
    for path, _, sentence in keys:
        assert sentence.endswith(".") and "\n" not in sentence, path


def test_described_defaults_are_the_defaults():
    dumped = yaml.safe_load(Config().to_yaml())
    for path, default, _ in describe():
        value = dumped
        for part in path.split("."):
            value = value[part]
        assert value == default, path


def test_every_algorithm_is_known_and_resolves_to_its_recipe():
    assert set(ALGORITHMS) == set(ALGORITHM_NAMES)
    for name, recipe in ALGORITHMS.items():
        resolved = Config(algorithm={"name": name}).algorithm
        keys = flatten(resolved.model_dump())
        found = vars(make_recipe_from(Config(algorithm={"name": name})))
        for slot, part in vars(recipe).items():
            options = getattr(part, "options", None)
            if slot == "aggregate" and part.name in SCALED_MODES:
                options = {**options, "scale": Config().rollout.max_tokens}  # however long the rows are
            assert getattr(found[slot], "options", None) == options, (name, slot)
        for slot, parts in spec_of(recipe).items():
            for part in parts:
                for option, value in part.options.items():
                    if option in FACTORIES.get(slot, {}).get(part.factory, {}):
                        # null: the part's own default
                        assert keys[key_of(part.factory, option)] in (value, None), (name, option)
        assert resolved.aggregation == recipe.aggregate.name, name
        assert resolved.modulation == (recipe.modulate.name if recipe.modulate else "none")
        unread = keys.keys() - read_keys(spec_of(recipe)) - {"name", "modulation", "loss", "aggregation"}
        assert all(keys[key] == flat_defaults()[key] for key in unread), name


@pytest.mark.parametrize(
    ("section", "key", "choices"),
    [
        (AlgorithmConfig, "loss", map(spelled, FACTORIES["objective"])),
        (AlgorithmConfig, "aggregation", AGGREGATIONS),
        (AlgorithmConfig, "kl_kind", KL_KINDS),
        (AlgorithmConfig, "singleton", SINGLETONS),
        (AlgorithmConfig, "modulation", ("none", *FACTORIES["modulate"])),
        (EmpgConfig, "scope", SCOPES),
        (EmpgConfig, "center", CENTERS),
        (AemConfig, "scope", SCOPES),
        (AemConfig, "mean", MEANS),
        (
            CorrectionConfig,
            "kind",
            ("none", *(FACTORIES["correct"].keys() - {"sequence_mask", "entropy_ratio"})),
        ),
        (CorrectionConfig, "level", LEVELS),
        (CorrectionConfig, "stale_mode", STALE_MODES),
    ],
)
def test_choices_are_those_of_the_algorithms(section, key, choices):
    assert literal_choices(section.model_fields[key].annotation) == set(choices)


def literal_choices(annotation):
    """The choices of a literal, or of one that may be null."""
    inner = (literal_choices(part) if get_args(part) else {part} for part in get_args(annotation))
    return set().union(*inner) - {type(None)}


def test_only_length_and_logs_may_change_on_resume():
    check_resumable(["train.updates=300", "log.progress=false", "compile_cache=null"])
    check_resumable(["rollout.data=2", "rollout.tensor=2", "rollout.devices=2", "rollout.release=true"])
    message = r"seed=3: a resumed run may change only train\.updates and compile_cache and log\.\*"
    with pytest.raises(ConfigError, match=message):
        check_resumable(["train.updates=300", "seed=3"])


TABLES = [key for key, default, _ in describe() if isinstance(default, dict)]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("edit", ["{CPU: 2, added: 1}", "{added: 1}", "{}"])
def test_a_table_of_free_keys_may_not_change_on_resume(table, edit):
    """A key added to it, one taken out of it, all of them."""
    with_ray = ["workers.backend=ray", "env.options={}"]
    before = load_config("quickstart", [*with_ray, f"{table}={{CPU: 2}}"])
    now = load_config("quickstart", [*with_ray, f"{table}={{}}", f"{table}={edit}"])
    check_unchanged(before.to_yaml(), before, "here")
    with pytest.raises(ConfigError, match=rf"{re.escape(table)}={{.*}} \(was {{'CPU': 2"):
        check_unchanged(before.to_yaml(), now, "here")


def test_keys_of_another_version_are_passed_over_on_resume():
    config = load_config("quickstart")
    saved = yaml.safe_load(config.to_yaml())
    del saved["env"]["parser"], saved["workers"]["ray_resources"]
    check_unchanged(yaml.safe_dump({**saved, "old": {"key": 1}}), config, "here")


def test_the_resolved_quickstart_for_bare_images_is_up_to_date() -> None:
    resolved = Path(__file__).parents[2] / "scripts" / "quickstart.resolved.yaml"
    assert resolved.read_text() == load_config("quickstart").to_yaml(), (
        "configs/quickstart.yaml or a default changed: "
        "empg-jax config quickstart > scripts/quickstart.resolved.yaml"
    )


def test_training_loads_without_the_packages_of_the_command_line():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'typer'))); import empg_jax.trainer\n"
        "from empg_jax.config.yaml import apply_override; import empg_jax.config as config\n"
        "try: config.load_config\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pydantic" in done.stdout


def test_a_file_may_start_from_another(tmp_path):
    (tmp_path / "first.yaml").write_text("base: quickstart\nrollout: {group_size: 4}\nenv: {max_turns: 3}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nenv: {options: {}, max_turns: 5}\nseed: 3\n")
    config, quickstart = load_config(tmp_path / "second.yaml"), load_config("quickstart")
    assert (config.name, config.seed, config.env.max_turns, config.rollout.group_size) == ("second", 3, 5, 4)
    assert config.rollout.tasks_per_update == quickstart.rollout.tasks_per_update
    assert quickstart.env.options and not config.env.options


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("own.yaml", r"own\.yaml: the chain of base files is a circle: own\.yaml -> own\.yaml"),
        ("missing.yaml", r"own\.yaml: base=missing\.yaml: no configuration file .*missing\.yaml"),
        ("quickstrat", r"own\.yaml: base=quickstrat: no packaged configuration 'quickstrat'.*quickstart"),
        ("[1]", r"own\.yaml: base=\[1\] must be the name or the path of a configuration"),
    ],
)
def test_a_base_that_cannot_be_read_is_named(tmp_path, base, message):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("address", ["node0:8476", "10.0.0.1:65534", "::1:8476", "[fd00::1]:8476"])
def test_a_coordinator_may_have_any_kind_of_address(address):
    hosts = {"coordinator": address, "num": 2, "index": 0}
    assert Config.model_validate({"hosts": hosts}).hosts.coordinator == address


def test_a_size_that_a_model_has_itself_is_told_to_have_no_effect():
    given = ["model.preset=qwen2.5-0.5b", "model.num_layers=2", "model.rope_theta=10000.0"]
    notes = [note for note in load_config("quickstart", given).notes if "brings its own sizes" in note]
    assert notes == [
        f"{key} has no effect: model.preset=qwen2.5-0.5b brings its own sizes" for key in given[1:]
    ]
    assert not [note for note in load_config("quickstart", given[:1]).notes if "own sizes" in note]

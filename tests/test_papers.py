"""The papers' recipes: every file says what it is, is the named method, and trains with a tiny model."""

import re

import pytest

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.config.hosts import seats_of
from empg_jax.plan.explain import GIB, find_shape
from empg_jax.plan.memory import compute_plan
from empg_jax.run.assembly import describe_algorithm, make_recipe_from
from empg_jax.run.devices import check_planned
from tests.runs import ROOT, TINY, lines

FILES = {path.stem: path for path in sorted((ROOT / "configs" / "papers").glob("*.yaml"))}
# What stands in for the papers' models, machines and data; algorithm, prompts and rewards stay the file's.
SMALL = [
    *(line for line in TINY if not line.startswith(("rollout.max_tokens", "train.micro_tokens", "env."))),
    "model.path=null",
    "model.dtype=float32",
    "rollout.slots=4",
    "rollout.data=1",
    "rollout.tensor=1",
    "rollout.max_tokens=1024",
    "rollout.prefill_buckets=[256]",
    "mesh.fsdp=1",
    "mesh.tensor=1",
    "env.max_turns=3",
    "env.options={}",  # the next line's options replace the file's
    "train.updates=2",
    "train.micro_tokens=4096",
    "train.num_minibatches=1",
    "sft.updates=0",
    "eval.tasks=2",
    "checkpoint.every=2",
    "workers.step_timeout=60",
]
GENERATED = {
    "alfworld": [
        "env.options={source: generated, level: tiny, max_turns: 3, win_reward: 10}",
        "env.eval_split=valid",
    ],
    "webshop": ["env.options={level: tiny, win_reward: 10.0}"],
    "deepsearch": [
        "env.options={level: tiny, style: search_r1, tools: [search, browse], topk: 2, max_turns: 3}",
        "model.tokenizer=bytes",
    ],
    "swe": [
        "env.options={tools: functions, max_turns: 3, command_timeout: 10, grade_timeout: 30}",
        "model.tokenizer=bytes",
        "rollout.max_tokens=4096",
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_recipe_is_the_method_of_its_name(name):
    method, base, _, size = name.split("_")
    config = load_config(f"papers/{name}")
    said = describe_algorithm(config)
    assert config.algorithm.modulation == method and f" + {method.upper()} (" in said
    assert {"empg": "zeta=0.1", "aem": "lambda=1, group, min_range=0.1"}[method] in said
    assert config.rollout.filter_groups == (base in ("dapo", "rloo"))
    options = make_recipe_from(config).objective.options
    assert options["clip_high"] == {"grpo": 0.2, "gspo": 4e-4}.get(base, 0.28)
    assert ("gspo" in said.lower()) == (base == "gspo")
    assert re.search(rf"-{size}\b", config.model.path, re.I)
    assert config.mesh.fsdp * config.mesh.tensor > 1
    top = re.match("(#.*\n)+", FILES[name].read_text()).group()
    assert "ublished" in top and {"empg": "2509.09265", "aem": "2605.00425"}[method] in top


@pytest.mark.parametrize("name", ["swe_verified", "papers/aem_rloo_swe_32b"])
def test_deepswes_filter_leaves_out_episodes_that_a_limit_ended(name):
    (part,) = make_recipe_from(load_config(name)).keep
    assert (part.name, part.options) == ("mask_truncated", {"unit": "limit"})


def test_every_recipe_is_in_the_table_of_published_numbers():
    table = (ROOT / "configs" / "README.md").read_text()
    assert set(re.findall(r"`papers/([\w.]+)`", table)) == FILES.keys()


def planned_rows():
    """The rows of the page's table: recipe, devices, overrides and the last cell."""
    page = (ROOT / "configs" / "README.md").read_text()
    table = page.partition("| GiB on the fullest device |\n")[2].partition("\n\n")[0]
    recipe, overrides, rows = "", [], []
    for line in table.splitlines()[1:]:
        first, devices, changes, said = (cell.strip() for cell in line.strip("|").split("|"))
        own = [word for quoted in re.findall(r"`(.*?)`", changes) for word in quoted.split()]
        recipe = first.strip("`") if first.startswith("`") else recipe
        overrides = [*overrides, *own] if changes.startswith("the same") else own
        rows.append((recipe, devices, overrides, said))
    return rows


@pytest.mark.parametrize(("recipe", "devices", "overrides", "said"), planned_rows())
def test_the_page_tells_what_the_plan_says_of_the_papers_recipes(recipe, devices, overrides, said):
    hosts = re.search(r", (\d+) hosts", devices)
    config = load_config(f"papers/{recipe}", [*overrides, *seats_of(hosts and int(hosts[1]))])
    check_planned(config)
    needed = compute_plan(config, find_shape(config)).total / GIB
    memory = {"A100": 80, "H200": 141, "v5p": 95, "v5e": 16}[re.search(r"A100|H200|v5p|v5e", devices)[0]]
    assert int(re.match(r"\d+", said)[0]) == round(needed)
    assert ("does not fit" in said) == (needed > memory)


METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
# What a method's file is known by: part of the first line of its run, and values that were published.
KNOWN_BY = {
    "a2tgpo": ("A2TGPO", "estimate", {"turn_gamma": 1.0, "alpha": 0.3, "clip_range": 0.3}),
    "beacon": ("BEACON", "estimate", {"turn_gamma": 0.9, "weight": 10.0}),
    "crbc": ("CRBC", "estimate", {"beta": 0.98, "weight": 5.0, "trajectory_weight": 1.0, "min_std": 0.1}),
    "erc": ("entropy_ratio(low=0.95, high=1.05)", "objective", {"clip_high": 0.28, "dual_clip": 10.0}),
    "gagpo": ("GAGPO", "objective", {"ratio": "mean"}),
    "graft": ("GRAFT", "estimate", {"gamma": 0.99, "lam": 0.95}),
    "graph_gpo": ("GraphGPO", "estimate", {"decay": 0.1, "fail_node": "observation"}),
    "graph_hca": ("GraphHCA", "estimate", {"gamma": 0.95, "floor": 0.01, "weight": 1.0}),
    "hgpo": ("HGPO", "estimate", {"history": 2, "alpha": 1.0, "turn_gamma": 0.95}),
    "igpo": ("IGPO", "estimate", {"turn_gamma": 1.0, "normalize": "joint", "kind": "prob"}),
    "kl_v32": ("kl(coef=0.01, kind=k3_is)", "estimate", {"scale_by_std": False}),
    "sampo": ("drop_uniform(unit=group)", "objective", {"clip_low": 3e-3, "clip_high": 4e-3}),
    "turn_ppo": ("Turn-PPO", "estimate", {"turn_gamma": 0.99, "turn_lam": 0.9}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_is_that_method_and_takes_a_modulation(name):
    said, slot, published = KNOWN_BY[name]
    config = load_config(f"methods/{name}")
    assert said in describe_algorithm(config)
    options = getattr(make_recipe_from(config), slot).options
    assert {key: options[key] for key in published} == published
    top = re.match("(#.*\n)+", METHODS[name].read_text()).group()
    assert "ublished" in top and ("arXiv 2" in top or name == "graft")
    aem = load_config(f"methods/{name}", ["algorithm.modulation=aem"])
    assert " + AEM (" in describe_algorithm(aem)


def test_sampo_is_trained_and_evaluated_as_its_paper_says():
    config = load_config("methods/sampo")
    assert config.train.updates == 200
    assert (config.eval.temperature, config.eval.top_p, config.eval.top_k) == (0.6, 0.95, 20)


@pytest.mark.parametrize(("name", "rows"), [("alfworld_verl", 256), ("webshop_verl", 64)])
def test_minibatches_that_differ_from_verl_agents_are_told(name, rows):
    """Theirs have a fixed number of step rows."""
    config = load_config(name)
    episodes = config.rollout.tasks_per_update * config.rollout.group_size
    most = episodes * config.env.max_turns // rows
    said = f"num_minibatches: 16  # of equal size; verl-agent's have {rows} step rows each, so up to {most} "
    assert said in (ROOT / "configs" / f"{name}.yaml").read_text()


def test_every_method_is_in_the_table():
    """Each in ALFWorld, unless its row says otherwise."""
    table = (ROOT / "configs" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `methods/(\w+)` \|(.*)$", table, re.M))
    assert rows.keys() == METHODS.keys() == KNOWN_BY.keys()
    for name, row in rows.items():
        wanted = "deepsearch" if "Deep Search" in row else "alfworld"
        assert load_config(f"methods/{name}").env.name == wanted


@pytest.mark.parametrize("name", ["deepsearch_search_r1", "papers/empg_dapo_deepsearch_32b", "methods/igpo"])
def test_turns_of_search_r1_end_at_their_tags(name):
    """Else the policy's own words stand where what was found should follow."""
    config = load_config(name)
    tags = {f"</{tag}>" for tag in (*config.env.options.get("tools", ["search"]), "answer")}
    assert set(config.rollout.stop) == tags


@pytest.mark.parametrize("name", [n for n in FILES if "alfworld" in n or "webshop" in n])
def test_the_way_to_the_papers_equations_keeps_the_method(name):
    own = load_config(f"papers/{name}").algorithm
    found = load_config(f"papers/{name}", [f"algorithm.name=grpo_{own.modulation}"]).algorithm
    assert (found.name, found.modulation) == ("grpo", own.modulation)


def make_small(name, run_dir="run"):
    return load_config(f"papers/{name}", [*SMALL, *GENERATED[name.split("_")[2]], f"run_dir={run_dir}"])


# Two of the four environments. The other files differ from these and each other in a few keys, which the
# first test reads, and in prompts.
TRAINED = ["empg_dapo_deepsearch_32b", "aem_rloo_swe_32b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TRAINED else pytest.mark.long) for name in FILES]
)
def test_recipe_trains(name, tmp_path):
    run_dir = trainer.train(make_small(name, tmp_path / "run"))
    updates = [line for line in lines(run_dir) if "loss" in line]
    assert len(updates) == 2

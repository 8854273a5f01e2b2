"""The methods of cbnb.step.zoo: each loss against the authors' own formula, gradients, low precision,
options, and a run of each that goes on after a stop."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from cbnb.config import OBJECTIVES, ZOO, CircuitBreakerConfig, ConfigError, get_config
from cbnb.data.streams import encode_stream
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import Run
from cbnb.run.metrics import read_metrics
from cbnb.run.settings import run_settings
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.step.objectives import (
    Objective,
    Pair,
    check_objective,
    check_terms,
    describe_terms,
    find_objective,
    idle_settings,
    option,
    option_values,
    run_terms,
    term_words,
)
from cbnb.step.zoo import directions_for, pair_distances, random_directions
from cbnb.train.breaker import state_terms
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.tinyworld import make_transcripts

LAYERS, ROWS, LENGTH, WIDTH = 3, 3, 5, 8  # hidden states of an embedding and of two blocks
TARGETS = (1, 2)  # the indices of those that the harmful terms read


@pytest.fixture(scope="module")
def world():
    "Hidden states [LAYERS, ROWS, LENGTH, WIDTH] of two models on harmful and benign rows, and masks."
    draw = np.random.default_rng(42)
    shape = (LAYERS, ROWS, LENGTH, WIDTH)
    states = {name: draw.standard_normal(shape) for name in ("h", "h0", "b", "b0")}
    states["b"] = states["b0"] + 0.1 * states["b"]
    states["b"][0] = states["b0"][0]  # no adapter changes the embedding
    masks = {"h": np.arange(LENGTH) < [[5], [3], [4]], "b": np.arange(LENGTH) < [[2], [5], [4]]}
    return states, masks


def norm(x):
    return np.sqrt((x**2).sum(-1))


def cosine(x, y):
    return (x * y).sum(-1) / norm(x) / norm(y)


# GraySwanAI/circuit-breakers, src/lorra_circuit_breaker.py, as copied in AIM-Intelligence/RepBend (commit
# 4f49776), methods/circuit_breaker/trainer.py: the loss of harmful rows is that of lines 74-79, the sum of
# relu(cosine) over the tokens by their number; that of benign rows that of lines 62-65, a mean over all
# hidden states and all positions, with the states of padding at 0
def official_losses(states, masks):
    mask = masks["h"][None].repeat(len(TARGETS), 0)
    ours, theirs = (np.stack([states[name][t] for t in TARGETS]) for name in ("h", "h0"))
    reroute = (np.maximum(cosine(ours, theirs), 0) * mask).sum() / mask.sum()
    cut = masks["b"][None, ..., None]
    return reroute, np.nanmean(norm(states["b"] * cut - states["b0"] * cut))


# centerforaisafety/wmdp, rmu/unlearn.py, as copied in sheepjun0330/wmdp-main (commit 0f744c7),
# compute_rmu_forget_loss and compute_rmu_retain_loss: mean squared errors, here over tokens, since the code
# has no padding in mind; and AIM-Intelligence/RepBend, methods/rmu/trainer.py, lines 47-59: the same with
# padding at 0 on both sides, and in the mean. One layer each, so a mean over layers stands for several.
def rmu_losses(states, masks, target, padding):
    out = []
    for name, goal in (("h", target), ("b", states["b0"])):
        error = ((states[name] - goal) ** 2)[list(TARGETS)] * masks[name][None, ..., None]
        out.append(error.mean() if padding else error.sum() / masks[name].sum() / len(TARGETS) / WIDTH)
    return out


# AIM-Intelligence/RepBend, methods/rep_bending/trainer.py: lines 303 and 316, sums of norms by the number
# of tokens; 353-367, 1 - cosine of each pair of rows at one position of each, by layer; 403, their sum with
# signs. The position is the last of each row.
def repbend_losses(states, masks, beta, gamma):
    mask = masks["h"][None].repeat(len(TARGETS), 0)
    away = (norm(states["h"] - states["h0"])[list(TARGETS)] * mask).sum() / mask.sum()
    together = 0
    for t in TARGETS:
        last = [states["h"][t, row, n - 1] for row, n in enumerate(masks["h"].sum(1))]
        pairs = [1 - cosine(x, y) for i, x in enumerate(last) for j, y in enumerate(last) if i != j]
        together += np.mean(pairs) / len(TARGETS)
    keep = masks["b"][None].repeat(len(TARGETS), 0)
    safe = (norm(states["b"] - states["b0"])[list(TARGETS)] * keep).sum() / keep.sum()
    return gamma * together - beta * away, away, together, safe


# samuelsimko/crl-llm-defense (commit 3e177d2), code/methods/triplet/trainer.py: _mean_hidden_states, the
# mean of the harmful states by layer over rows and tokens; _calc_safe_loss and _calc_unsafe_loss, relu(d_p
# - d_n + margin), summed over tokens, by their number; dist, the distances
def triplet_losses(states, masks, kinds, margins):
    def dist(x, y, kind):
        mix = norm(x - y) + 10 * (1 - np.maximum(cosine(x, y), 0))
        return {"norm": norm(x - y), "cosine": 1 - cosine(x, y), "mix": mix, "none": 0 * norm(x - y)}[kind]

    harmful, benign = [], []
    for t in TARGETS:
        h, h0, b, b0 = (states[name][t] for name in ("h", "h0", "b", "b0"))
        mean = (h * masks["h"][..., None]).sum((0, 1)) / masks["h"].sum()
        away = dist(h, mean + 0 * h, kinds[0]) - dist(h, h0, kinds[1]) + margins[0]
        near = dist(b, b0, kinds[2]) - dist(b, mean + 0 * b, kinds[3]) + margins[1]
        harmful.append((np.maximum(away, 0) * masks["h"]).sum() / masks["h"].sum())
        benign.append((np.maximum(near, 0) * masks["b"]).sum() / masks["b"].sum())
    return np.mean(harmful), np.mean(benign)


TRIPLET = ("harmful_to_centre", "harmful_to_teacher", "benign_to_teacher", "benign_to_centre")
PUBLISHED, OTHERS = ("cosine", "cosine", "norm", "cosine"), ("norm", "mix", "mix", "norm")
RANDOM = [0.34021942235, 0.488324707822, 0.422180853261, 0.122573053527, 0.163370885756, 0.475447134818,
          0.002865736473, 0.446968300118]  # fmt: skip
FIXTURES = {
    "official": (0.15875830022876983, 0.12746550745209614),
    "rmu": (6.426005498269292, 0.009552611497249165),
    "rmu with padding": (5.140804398615433, 0.007005248431316054),
    "repbend": (-1.9254690549821547, 0.2607249016065603),
    "triplet": (2.6404492092569463, 1.289709466283679),
    "triplet of other distances": (0.12011029734487069, 5.272829399538143),
}  # of the formulas above on the states of `world`, (harmful, benign)


def terms_of(world, name, options="none", retain=TARGETS, **settings):
    "`(loss_reroute, loss_retain)` of an objective on the tokens of the masks, as a training step takes them."
    states, masks = world
    config = get_config("tinyagent", objective=name, objective_options=options, **settings)
    tensors = {
        name: {layer: torch.from_numpy(states[name][layer][masks[name[0]]]) for layer in range(LAYERS)}
        for name in states
    }
    harmful = {layer: Pair(tensors["h"][layer], tensors["h0"][layer]) for layer in TARGETS}
    benign = {layer: Pair(tensors["b"][layer], tensors["b0"][layer]) for layer in retain}
    counts = torch.tensor([masks["h"].sum(), masks["b"].sum(), 1], dtype=torch.float64)
    terms = state_terms(find_objective(name), harmful, benign, counts, config)
    return terms["loss_reroute"].item(), terms["loss_retain"].item()


def close(got, wanted):
    return all(abs(g - w) <= 1e-6 * (1 + abs(w)) for g, w in zip(got, wanted, strict=True))


def test_the_formulas_give_the_numbers_that_are_kept(world):
    target = 6.5 * np.array(RANDOM)
    values = {
        "official": official_losses(*world),
        "rmu": rmu_losses(*world, target, False),
        "rmu with padding": rmu_losses(*world, target, True),
        "repbend": repbend_losses(*world, 0.5, 0.1)[::3],
        "triplet": triplet_losses(*world, PUBLISHED, (3, 2)),
        "triplet of other distances": triplet_losses(*world, OTHERS, (1, 8)),
    }
    assert values.keys() == FIXTURES.keys()
    for name, value in values.items():
        assert np.allclose(value, FIXTURES[name], rtol=1e-9, atol=1e-10), (name, value)


def shares(world):
    "Which part of the positions padding is, of harmful and of benign rows."
    return [1 - world[1][name].mean() for name in ("h", "b")]


def test_the_official_circuit_breaker(world):
    everything = 1 - (LAYERS - 1) / LAYERS * world[1]["b"].mean()
    assert close(terms_of(world, "rr_official", f"zeros={everything:.17g}"), FIXTURES["official"])
    plain = terms_of(world, "rr_official")
    assert close(plain, terms_of(world, "rr")), "the paper's reading, a mean over tokens"
    assert plain[1] == pytest.approx(FIXTURES["official"][1] / (1 - everything))


def test_rmu(world):
    assert close(terms_of(world, "rmu", "steering=6.5", seed=7), FIXTURES["rmu"])
    harmful, benign = (
        terms_of(world, "rmu", f"steering=6.5,zeros={share:.17g}", seed=7) for share in shares(world)
    )
    assert close((harmful[0], benign[1]), FIXTURES["rmu with padding"])


def test_repbend(world):
    "The distances over all tokens, the pairs over those that the code takes, one of each row."
    _, away, together, safe = repbend_losses(*world, 0.5, 0.1)
    assert close(terms_of(world, "repbend", "beta=0.5,gamma=0"), (-0.5 * away, safe))
    states, masks = world
    last = {"h": masks["h"] & (np.cumsum(masks["h"], 1) == masks["h"].sum(1, keepdims=True)), "b": masks["b"]}
    assert close(terms_of((states, last), "repbend", "beta=0,gamma=0.1"), (0.1 * together, safe))
    whole = terms_of((states, last), "repbend")
    assert close(whole, repbend_losses(states, last, 0.5, 0.0)[::3] + np.array([0.1 * together, 0]))


def test_triplets(world):
    assert close(terms_of(world, "triplet"), FIXTURES["triplet"])
    options = ",".join(f"{name}={kind}" for name, kind in zip(TRIPLET, OTHERS))
    got = terms_of(world, "triplet", f"{options},harmful_margin=1,benign_margin=8")
    assert close(got, FIXTURES["triplet of other distances"])
    nothing = ",".join(f"{name}=none" for name in TRIPLET)
    assert terms_of(world, "triplet", nothing) == (3, 2), "margins alone"


@pytest.mark.parametrize("kind", ["centred", "positive"])
def test_random_directions(world, kind):
    states, masks = world
    for each in ("run", "token"):
        values = {"cosine": [], "l2": []}
        for t in TARGETS:
            h = states["h"][t][masks["h"]]
            vectors = random_directions(len(h), WIDTH, kind, 7)
            vectors = vectors[:1] + 0 * h if each == "run" else vectors
            values["cosine"].append(np.mean(1 - cosine(h, vectors)))
            values["l2"].append(np.mean(norm(h - vectors)))
        for distance, wanted in values.items():
            options = f"kind={kind},each={each},distance={distance}"
            got = terms_of(world, "rr_random", options, seed=7)
            assert close(got, (np.mean(wanted), terms_of(world, "rr")[1]))


def test_a_direction_is_a_function_of_the_seed_alone():
    assert np.allclose(random_directions(1, 8, "positive", 7)[0], RANDOM, atol=1e-11)
    many = random_directions(50, 7, "centred", 3)
    assert all((random_directions(n, 7, "centred", 3) == many[:n]).all() for n in (1, 2, 49))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    states = torch.zeros(4, 8, dtype=torch.bfloat16)
    one, two = (directions_for(states, "centred", "token", 5) for _ in range(2))
    assert one.equal(two) and one.dtype == torch.float32 and torch.get_rng_state().equal(before)


CASES = [
    ("rr_official", "zeros=0.3"),
    ("rr_random", "none"),
    ("rr_random", "kind=positive,each=token,distance=l2"),
    ("rmu", "zeros=0.3"),
    ("repbend", "gamma=0.7"),
    ("triplet", "none"),
    ("triplet", ",".join(f"{name}={kind}" for name, kind in zip(TRIPLET, OTHERS)) + ",benign_margin=9"),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients(name, options):
    config = get_config("tinyagent", objective=name, objective_options=options)
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (3, 3, 4, 4)]
    objective = find_objective(name)
    inputs = [sides[0].requires_grad_(), sides[2].requires_grad_()]

    def harmful(h, b):
        return objective.reroute(Pair(h, sides[1]), Pair(b, sides[3]), config)

    def benign(b):
        return objective.retain(Pair(inputs[0], sides[1]), Pair(b, sides[3]), config)

    assert torch.autograd.gradcheck(harmful, inputs) and torch.autograd.gradcheck(benign, inputs[1:])
    both = objective.retain(Pair(inputs[0], sides[1]), Pair(inputs[1], sides[3]), config).sum()
    assert torch.autograd.grad(both, inputs[0], allow_unused=True)[0] is None, (
        "a benign term moves benign rows"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_low_precision_and_the_untouched_student(name, options, dtype):
    """In bfloat16 the values are those of float64 on the same states, and all is finite where student and
    teacher are equal, where a state is 0, and for one token alone."""
    config = get_config("tinyagent", objective=name, objective_options=options)
    draw = torch.Generator().manual_seed(1)
    sides = [30 * torch.randn(n, 64, generator=draw).to(dtype) for n in (5, 5, 6, 6)]
    objective = find_objective(name)
    for term in ("reroute", "retain"):
        low = getattr(objective, term)(Pair(*sides[:2]), Pair(*sides[2:]), config)
        exact = [side.double() for side in sides]
        high = getattr(objective, term)(Pair(*exact[:2]), Pair(*exact[2:]), config)
        assert low.dtype == torch.float32 and torch.allclose(low.double(), high, rtol=1e-4, atol=1e-4)
        for h in (sides[1], 0 * sides[1], sides[1][:1]):
            h = h.clone().requires_grad_()
            b = sides[3].clone().requires_grad_()
            teacher = h.detach().clone()
            values = getattr(objective, term)(Pair(h, teacher), Pair(b, sides[3]), config)
            gradients = torch.autograd.grad(values.sum(), [h, b], allow_unused=True)
            assert values.isfinite().all() and all(g.isfinite().all() for g in gradients if g is not None)


def test_pairs():
    states = torch.randn(6, 4, dtype=torch.float64)
    plain = 1 - torch.cosine_similarity(states[:, None], states[None], dim=-1)
    assert torch.allclose(pair_distances(states), plain.sum(1) / 5)
    assert torch.allclose(
        pair_distances(states[:1] + 0 * states), torch.zeros(6, dtype=torch.float64), atol=1e-12
    )


@pytest.mark.parametrize("name", ZOO)
def test_words_and_weights(name):
    config, notes = run_settings({"preset": "tinyagent", "objective": name, "retain_weight": 0.5})
    assert notes == [] and check_objective(config, {}) == []
    check_terms(config, 64)
    terms = describe_terms(find_objective(name), config)
    assert [terms[n].factors for n in ("reroute", "retain", "kl")] == [
        ("c_s",), ("c_r", "retain_weight"), ("c_r", "beta_kl")
    ]  # fmt: skip
    words = json.loads(json.dumps(term_words(config)))
    assert run_terms(name, words)["reroute"].title == run_terms(name)["reroute"].title
    assert run_terms(f"cbnb.step.zoo:{name}") == run_terms(name)
    read = {"rr_official", "rr_random", "repbend"}
    assert ("retain_relative" in idle_settings(find_objective(name), config)) == (name not in read)
    assert "beta_twin" in idle_settings(find_objective(name), config)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"objective": "rmu", "objective_options": "stearing=1"}, "did you mean 'steering'"),
        ({"objective": "rmu", "objective_options": "steering=inf"}, "a finite number, but 'inf'"),
        ({"objective": "rmu", "objective_options": "steering=0"}, "must be above 0"),
        ({"objective": "rmu", "objective_options": "steering"}, "is no option; write name=value"),
        ({"objective": "rmu", "objective_options": "steering=1,steering=2"}, "names steering twice"),
        ({"objective": "rr_random", "objective_options": "kind=centered"}, "did you mean 'centred'"),
        ({"objective": "rr", "objective_options": "steering=1"}, "rr_twin_adv, dpo, dpo_adv have no options"),
        ({"objective": "rmu", "retain_relative": True}, "retain_relative True would do nothing"),
        ({"objective": "rr_official", "retain_layers": "targets"}, "rr_official holds every block"),
        ({"objective": "repbent"}, "did you mean 'repbend'"),
    ],
)
def test_options_are_strict(parameters, words):
    with pytest.raises(ConfigError, match=words):
        run_settings({"preset": "tinyagent", **parameters})


def test_a_triplet_has_no_harmful_states_outside_the_target_layers():
    config = get_config("tinyagent", objective="triplet", retain_layers="all")
    with pytest.raises(ConfigError, match="leave retain_layers out"):
        check_terms(config, 16)


def test_an_objective_of_ones_own_declares_options():
    rr = find_objective("rr")

    def weights(config, c_s, c_r):
        return rr.weights(config, c_s, c_r) | {"reroute": c_s * option_values(config)["push"]}

    with pytest.raises(ConfigError, match="push must be at least 0"):
        option("push", -1.0, "how hard", at_least=0)
    with pytest.raises(ConfigError, match="make its options by"):
        Objective("mine", rr.terms, weights, (("push", 2.0),))
    OBJECTIVES["mine"] = mine = Objective("mine", rr.terms, weights, (option("push", 2.0, "how hard"),))
    try:
        config = get_config("tinyagent", objective="mine")
        assert mine.weights(config, 3.0, 1.0)["reroute"] == 6
        assert mine.weights(replace(config, objective_options="push=0.5"), 3.0, 1.0)["reroute"] == 1.5
        assert describe_terms(mine, config)["reroute"].factors == ("c_s",)
    finally:
        del OBJECTIVES["mine"]
    assert CircuitBreakerConfig(objective="rmu", objective_options="steering=2").objective_options == (
        "steering=2",
    )


class Stop(TrainerCallback):
    "Leaves a stop file in step 3."

    def __init__(self, folder):
        self.folder = folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (self.folder / "stop").touch()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rr_random", "each=token"),
        ("rmu", "none"),
        ("repbend", "none"),
        ("triplet", "none"),
        ("rr_official", "none"),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, name, options):
    config = get_config(
        "tinyagent", objective=name, objective_options=options, retain_weight=0.1, total_steps=5,
        batch_size=2, warmup_steps=1, save_steps=1, diagnose_steps=2,
    )  # fmt: skip
    masker = ChatMasker(load_tokenizer("tinyagent"))
    harmful, _ = encode_stream(make_transcripts("injection", 6), masker, config.harmful_policy)
    benign, _ = encode_stream(make_transcripts("plain", 6), masker, config.benign_policy)

    def attempt(folder, *callbacks):
        folder.mkdir(exist_ok=True)
        if not (folder / "status.json").exists():
            (folder / "status.json").write_text(json.dumps({"state": "running"}))
        (folder / "stop").unlink(missing_ok=True)
        student = add_adapter(load_model("tinyagent"), config)
        pad = masker.tokenizer.pad_token_id
        done = train_breaker(student, harmful, benign, config, Run(folder), pad, callbacks=list(callbacks))
        return done, [row["loss"] for row in read_metrics(folder)]

    whole, losses = attempt(tmp_path / "whole")
    stopped, _ = attempt(tmp_path / "cut", Stop(tmp_path / "cut"))
    again, others = attempt(tmp_path / "cut")
    assert whole and not stopped and again and losses == others and len(losses) == 5
    assert losses[0] != losses[-1] and all(np.isfinite(losses))

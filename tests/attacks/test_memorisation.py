"""Exposure and extraction: known answers, laws whose probabilities are exact, and a model that was over-fitted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from attacks.analysis import statistics
from attacks.analysis.analyse import analyse_run
from attacks.analysis.memorisation import canary_panel, extraction_panel
from attacks.analysis.memorisation.exposure import MAX_BITS, exposure, null_mean, skew_normal
from attacks.analysis.memorisation.extraction import MIN_SUFFIX, recall, samples_needed
from attacks.errors import AttackInputError
from attacks.reporting.report import write_report
from attacks.rundir import read_statement
from attacks.scoring.neural import sampled_logp
from attacks.scoring.sampling_scheme import SamplingScheme
from attacks.scoring.score import ScoreOptions, score_run
from attacks.scoring.variants import CONTROL_PREFIX_TOKENS, exchange_prefixes
from attacks.signals import CONTROL_PREFIX, HELD_IN, HELD_OUT, SIGNALS_PATH, TRAINING, DocumentSignals
from privtrain.data.canaries import Canary, canaries_of
from privtrain.data.manifest import read_sealed
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from tests.attacks.conftest import put_signals
from tests.attacks.exact_models import Markov
from tests.attacks.signal_files import read_signals
from tests.conftest import save_tiny_llama, tiny_tree, write_config

# --- sampling schemes


@pytest.mark.parametrize(
    "text", ["", "temperature=0.7", "top_k=5", "top_k=0,top_p=0.8", "temperature=1.3,top_k=20,top_p=0.6"]
)
def test_scheme_probabilities_are_what_transformers_draws_from(text):
    scheme = SamplingScheme.parse(text)
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 50)
    warped = TemperatureLogitsWarper(scheme.temperature)(None, logits)
    if scheme.top_k:
        warped = TopKLogitsWarper(scheme.top_k)(None, warped)
    if scheme.top_p < 1.0:
        warped = TopPLogitsWarper(scheme.top_p)(None, warped)
    expected = warped.log_softmax(-1)
    for label in range(50):
        found = sampled_logp(logits, torch.full((64,), label), scheme)
        assert torch.equal(found == -math.inf, expected[:, label] == -math.inf)
        finite = found > -math.inf
        assert torch.allclose(found[finite], expected[:, label][finite], atol=1e-5)


@pytest.mark.parametrize("text", ["top_k=-1", "temperature=0", "top_p=0", "top_p=1.1", "beams=4", "top_k=x", "top_k"])
def test_a_scheme_that_is_none_is_refused(text):
    with pytest.raises(AttackInputError, match="expected"):
        SamplingScheme.parse(text)


# --- extraction

MODEL = Markov([[0.0, 0.6, 0.4, 0.0], [0.05, 0.05, 0.85, 0.05], [0.02, 0.03, 0.05, 0.9], [0.1, 0.8, 0.05, 0.05]])


def row_of(tokens, model=MODEL, **more) -> DocumentSignals:
    (found,) = model.score([np.asarray(tokens)])
    logp = np.maximum(found.logp, -50.0)
    fields = {"user": "u", "document": "d", "side": HELD_IN, "kind": TRAINING, "base_correct": found.correct, **more}
    return DocumentSignals(
        target_logp=logp, base_logp=logp, target_correct=found.correct, target_sampled_logp=found.logp, **fields
    )


def greedy_output(model, start: list[int], length: int) -> list[int]:
    tokens = list(start)
    for _ in range(length):
        tokens.append(int(model.next_law(tokens).argmax()))
    return tokens[len(start) :]


def edit_distance(first: list[int], second: list[int]) -> int:
    costs = list(range(len(second) + 1))
    for i, mine in enumerate(first, 1):
        diagonal, costs[0] = costs[0], i
        for j, theirs in enumerate(second, 1):
            diagonal, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, diagonal + (mine != theirs))
    return costs[-1]


def documents(number: int) -> list[list[int]]:
    """Documents of the model's own, most of them along its greedy path with a slip near the end."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        tokens = MODEL.draw(rng, 3).tolist()
        tokens += greedy_output(MODEL, tokens, int(rng.integers(8, 25)))
        if rng.random() < 0.7:
            tokens[-int(rng.integers(1, 6))] = int(rng.integers(0, 4))
        found.append(tokens)
    return found


def test_greedy_and_near_say_what_decoding_gives():
    kinds = set()
    for tokens in documents(400):
        found = recall(row_of(tokens), "target", 3)
        suffix = tokens[4:]
        if found is None:
            assert len(suffix) < MIN_SUFFIX
            continue
        output = greedy_output(MODEL, tokens[:4], len(suffix))
        assert found.greedy == (output == suffix)
        assert not found.near or edit_distance(output, suffix) <= 0.1 * len(suffix)
        assert found.near or not found.greedy
        kinds.add((found.greedy, found.near))
    assert kinds == {(True, True), (False, True), (False, False)}


def test_the_probability_of_the_suffix_is_the_models():
    for tokens in documents(50):
        found = recall(row_of(tokens), "target", 3)
        if found is not None and MODEL.probability(tokens) > 0:
            expected = MODEL.probability(tokens) / MODEL.probability(tokens[:4])
            assert math.exp(found.log_prob) == pytest.approx(expected, rel=1e-5)


def test_samples_needed_agrees_with_simulation():
    rng, tokens = np.random.default_rng(1), [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    found = recall(row_of(tokens), "target", 2)
    chance = math.exp(found.log_prob)
    assert 0.2 < chance < 0.5
    for probability in (0.5, 0.9, 0.99):
        needed = samples_needed(found.log_prob, probability)
        # Draw suffixes from the model itself.
        for count, holds in ((needed, True), (needed - 1, False)):
            if count < 1:
                continue
            hits = 0
            for _ in range(600):
                hits += any(draw_suffix(rng, tokens[:3], 8) == tokens[3:] for _ in range(int(count)))
            interval = scipy.stats.binomtest(hits, 600).proportion_ci(0.9999)
            exact = 1 - (1 - chance) ** count
            assert (exact >= probability) == holds
            assert interval.low <= exact <= interval.high


def draw_suffix(rng, prefix: list[int], length: int) -> list[int]:
    tokens = list(prefix)
    for _ in range(length):
        tokens.append(int(rng.choice(4, p=MODEL.transitions[tokens[-1]])))
    return tokens[len(prefix) :]


@given(st.floats(-2000.0, 0.0), st.sampled_from([0.1, 0.5, 0.9, 0.999]))
def test_samples_needed_is_the_smallest_number(log_prob, probability):
    needed = samples_needed(log_prob, probability)
    assert needed >= 1
    assert samples_needed(log_prob / 2, probability) <= needed
    if needed < 1e6 and log_prob < -1e-6:
        miss = math.log1p(-math.exp(log_prob))
        assert needed * miss <= math.log1p(-probability) * (1 - 1e-12)
        assert needed == 1 or (needed - 1) * miss >= math.log1p(-probability) * (1 + 1e-12)


def test_what_cannot_be_drawn_is_never_discovered():
    assert samples_needed(-math.inf, 0.5) == math.inf
    assert samples_needed(0.0, 0.99) == 1


def test_prefixes_are_other_users():
    tokens = [np.arange(100 * user, 100 * user + 20 + user) for user in range(4)] + [np.arange(5)]
    found = exchange_prefixes(["a", "a", "b", "c", "d"], tokens)
    size = CONTROL_PREFIX_TOKENS + 1
    assert [None if ids is None else ids[0] for ids in found] == [200, 200, 300, 0, None]
    assert all(np.array_equal(ids[size:], own[size:]) for ids, own in zip(found[:4], tokens, strict=False))
    assert exchange_prefixes(["a", "a"], tokens[:2]) == [None, None]


def test_the_panel_counts_records_users_and_controls(make_run, monkeypatch):
    run = make_run(0)
    hit, miss = [0, *greedy_output(MODEL, [0], 30)], [0, *([0] * 30)]
    rows = [
        row_of(hit, user="a", document="1"),
        row_of(miss, user="a", document="2"),
        row_of(hit, user="b", document="1"),
        row_of(miss, user="c", document="1"),
        row_of(miss, user="a", document="1-control_prefix", kind=CONTROL_PREFIX),
        row_of(miss, user="x", document="1", side=HELD_OUT),
        row_of(hit, user="x", document="2", side=HELD_OUT, kind="fresh"),
    ]
    put_signals(run, rows)
    assert extraction_panel.panel(run, read_statement(run), 0) is None, "a row of three users is about each of them"
    monkeypatch.setattr(extraction_panel, "MIN_USERS", 1)
    found = extraction_panel.panel(run, read_statement(run), 0)
    table = {(row["prefix"], row["group"]): row for row in found["rows"]}
    own = table[16, extraction_panel.GROUPS["held-in"]]
    assert (own["num_records"], own["greedy"], own["near"]) == (4, 2, 2)
    assert own["users"].startswith("2 of 3 (9.4% to 99.2%)")
    assert table[16, extraction_panel.GROUPS["held-out"]]["num_records"] == 1
    assert table[16, extraction_panel.GROUPS["other prompt"]]["greedy"] == 0
    assert [row["prefix"] for row in found["rows"]] == [8] * 4 + [16] * 5
    p_z = math.exp(recall(rows[0], "target", 16).log_prob)
    curve = found["figure"]["series"][0]["y"]
    assert curve == [0.5 if 1 - (1 - p_z) ** count >= 0.5 else 0.0 for count in (1, 10, 100, 1000)]
    assert curve[-1] > 0.0


# --- exposure


def test_exposure_counts_ranks_and_lets_references_win_ties():
    references = np.array([-1.0, -2.0, -3.0])
    assert exposure(-0.5, references).bits == 2.0
    assert exposure(-2.5, references).bits == pytest.approx(2 - math.log2(3))
    assert exposure(-9.0, references).bits == 0.0
    tied = exposure(-1.0, references)
    assert (tied.bits, tied.tied_bits) == (1.0, 1.5)
    assert tied.extrapolated_bits is None
    for score, among in ((math.nan, references), (0.0, np.array([-1.0, math.nan])), (math.inf, references)):
        with pytest.raises(ValueError, match="not finite"):
            exposure(score, among)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60))
def test_the_controls_expectation_is_that_of_a_uniform_rank(values):
    """Whatever ties: each secret once in the canary's place."""
    scores = np.array(values, dtype=np.float64)
    every = [exposure(score, np.delete(scores, i), extrapolate=False).tied_bits for i, score in enumerate(scores)]
    assert np.mean(every) == pytest.approx(null_mean(scores.size), abs=1e-9)


def test_the_expectation_tends_to_log2_e():
    assert null_mean(100_000) == pytest.approx(math.log2(math.e), abs=1e-3)


def control_rejections(num_canaries, size, *, is_shared, num_samples, by_gamma=False):
    """How often the control's p-value is at most .05 for secrets that nobody trained on."""
    rng, found, mean = np.random.default_rng((num_canaries, size)), 0, null_mean(size)
    variance = np.log2(np.arange(1, size + 1)).var() * (1 / num_canaries + is_shared / size)
    law = scipy.stats.gamma(a=mean**2 / variance, scale=variance / mean)
    canary = Canary("canary-0", "samples" if is_shared else "template", "", "secret", 1, ())
    for _ in range(num_samples):
        pools = rng.normal(size=(1 if is_shared else num_canaries, size - 1)) * np.ones((num_canaries, 1))
        exposures = [exposure(rng.normal(), pool, extrapolate=False) for pool in pools]
        control = canary_panel._control([canary_panel.Scored(canary, False, None, [], {"tuned": e}) for e in exposures])
        if by_gamma:
            found += 2 * min(law.sf(control["mean_bits"]), law.cdf(control["mean_bits"])) <= 0.05
        else:
            found += control["p_value"] <= 0.05
    return found


@pytest.mark.parametrize(("num_canaries", "size"), [(1, 2), (3, 2), (2, 9), (20, 17)])
@pytest.mark.parametrize("is_shared", [True, False])
def test_control_of_few_canaries_keeps_its_level(num_canaries, size, is_shared):
    found = control_rejections(num_canaries, size, is_shared=is_shared, num_samples=100)
    assert found <= scipy.stats.binom.ppf(0.999, 100, 0.05)


def test_control_by_a_gamma_law_is_caught():
    """The planted mutant: one canary beside one other secret would be called wrong whenever it ranks last."""
    assert control_rejections(1, 2, is_shared=True, num_samples=100, by_gamma=True) > 30


def test_share_at_rank_one_carries_the_luck_of_the_pool():
    """Fifty untrained canaries among 32 secrets; the planted mutant takes them as independent."""
    rng, misses = np.random.default_rng(0), np.zeros(2, dtype=int)
    for _ in range(200):
        pool, scores = rng.normal(size=32), rng.normal(size=50)
        canary, top = Canary("canary-0", "samples", "", "secret", 1, ()), int((scores > pool.max()).sum())
        group = [canary_panel.Scored(canary, True, None, [], {}, np.append(pool, score)) for score in scores]
        ends = canary_panel._interval_of_top_ranks(group, top), statistics.clopper_pearson(top, 50)
        misses += [found.lower > 1 / 33 for found in ends]
    assert misses[0] <= scipy.stats.binom.ppf(0.999, 200, 0.025)
    assert misses[1] > scipy.stats.binom.ppf(0.999, 200, 0.025)


@pytest.mark.parametrize("shape", [-6.0, -1.0, 0.0, 2.0, 5.0])
def test_the_fitted_law_has_the_samples_moments(shape):
    values = scipy.stats.skewnorm(shape, loc=-40, scale=3).rvs(4000, random_state=1)
    mean, variance, skewness = scipy.stats.skewnorm(*skew_normal(values)).stats("mvs")
    assert mean == pytest.approx(values.mean())
    assert variance == pytest.approx(values.var())
    assert skewness == pytest.approx(np.clip(scipy.stats.skew(values), -0.99, 0.99), abs=1e-6)


def test_extrapolation_gives_the_tail_and_refuses_other_laws():
    rng = np.random.default_rng(0)
    wanted = -math.log2(scipy.stats.norm.sf(5.0))
    found = [exposure(5.0, rng.normal(size=512)) for _ in range(40)]
    kept = [each.extrapolated_bits for each in found if each.extrapolated_bits is not None]
    assert len(kept) >= 32
    assert np.median(kept) == pytest.approx(wanted, abs=3.0)
    assert max(each.bits for each in found) == pytest.approx(math.log2(513))
    two_humps = np.concatenate([rng.normal(-9, 1, 256), rng.normal(9, 1, 256)])
    refused = exposure(20.0, rng.permutation(two_humps))
    assert refused.fit_p_value < 1e-3
    assert refused.extrapolated_bits is None
    assert exposure(1e9, rng.normal(size=512)).extrapolated_bits in (MAX_BITS, None)


# --- end to end


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """Users with one sentence each, and canaries, which a tiny model saw over and over without noise."""
    folder = tmp_path_factory.mktemp("overfitted")
    letters, rng = np.array(list("abcdefgh ")), np.random.default_rng(5)
    with (folder / "users.jsonl").open("w", encoding="utf-8") as file:
        for user in range(12):
            text = "".join(rng.choice(letters, 40)).replace(" ", "z")
            file.writelines(json.dumps({"user": f"user-{user}", "text": text}) + "\n" for _ in range(3))
    tree = tiny_tree(save_tiny_llama(folder / "model", num_layers=1), folder / "users.jsonl", folder / "runs")
    del tree["lora"]
    tree["data"] = {
        "source": tree["data"]["source"],
        "max_length": 48,
        "attack_min_records": 3,
        "held_out_fraction": 0.5,
    }
    tree["canaries"] = {"num_users": 12, "repetitions": [1, 3], "num_digits": 12}
    tree["privacy"] |= {
        "sampling_prob": 1.0,
        "expected_batch_size": 14,
        "noise_multiplier": 0.0,
        "clipping_norm": 10.0,
        "num_steps": 300,
        "insecure_seed": 11,
    }
    tree["training"] = {"method": "full", "learning_rate": 0.01, "schedule": "linear"}
    tree["performance"] |= {"microbatch_size": 64, "checkpoint_interval_steps": 999}
    train(write_config(tree, folder / "c.yaml"))
    run = folder / "runs" / "tiny"
    score_run(run, ScoreOptions(num_canary_references=63, variants="control_prefix", batch_tokens=4096))
    analyse_run(run)
    write_report(run)
    return run


def test_overfitted_model_exposes_its_canaries_and_its_base_none(overfitted):
    found = canary_panel.read_canaries(overfitted)
    inside = [item.exposures for item in found if item.is_held_in]
    outside = [item.exposures["tuned"] for item in found if not item.is_held_in]
    assert min(len(inside), len(outside)) >= 4
    expected, variance = null_mean(64), np.log2(np.arange(1, 65)).var()
    assert np.mean([each["tuned"].bits for each in inside]) > 5.0
    for controls in ([each["base"] for each in inside], outside):
        error = math.sqrt(variance / len(controls))
        assert abs(np.mean([each.tied_bits for each in controls]) - expected) < 3 * error
    panel = json.loads((overfitted / "report/attacks.json").read_text())["panels"]["canaries"]
    assert [row["tier"] for row in panel["rows"]] == [1, 3]
    assert panel["control"]["p_value"] > 1e-3
    assert all(row["auroc"] > 0.9 for row in panel["rows"] if row.get("auroc") is not None)


def test_overfitted_model_gives_back_its_records_and_no_others(overfitted):
    panel = json.loads((overfitted / "report/attacks.json").read_text())["panels"]["extraction"]
    table = {(row["prefix"], row["group"]): row for row in panel["rows"]}
    own, base, others = (table[8, extraction_panel.GROUPS[key]] for key in ("held-in", "held-in, base", "held-out"))
    assert own["n1000"] > 0.5 * own["num_records"]
    assert base["n1000"] == 0
    assert others["n1000"] / others["num_records"] < 0.5 * own["n1000"] / own["num_records"]
    assert own["n1"] <= own["n10"] <= own["n100"] <= own["n1000"]


def test_control_prefixes_change_the_prompt_and_nothing_else(overfitted):
    rows = {(row.user, row.document): row for row in read_signals(overfitted / SIGNALS_PATH)}
    controls = [row for row in rows.values() if row.kind == CONTROL_PREFIX]
    assert controls
    for row in controls:
        own = rows[row.user, row.document.removesuffix("-control_prefix")]
        assert own.kind == TRAINING
        first, rest = slice(0, CONTROL_PREFIX_TOKENS), slice(CONTROL_PREFIX_TOKENS, None)
        assert row.token_ids[first].tolist() != own.token_ids[first].tolist()
        assert row.token_ids[rest].tolist() == own.token_ids[rest].tolist()
        assert row.target_sampled_logp.shape == row.target_logp.shape


def test_no_public_file_knows_a_secret(overfitted):
    canaries = canaries_of(read_sealed(RunDirectory(overfitted).manifest))
    for name in ("attacks.json", "index.html", "report.json", "report.md"):
        content = (overfitted / "report" / name).read_text()
        assert not any(needle in content for c in canaries for needle in (c.user, c.secret, c.prefix.strip()))

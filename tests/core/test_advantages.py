"""Token advantages: against plain loops in float64 written from the equations, and the invariants as properties."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erpo_core import ERPOSignals, erpo_advantages
from erpo_core.advantages import without_shaping

DEFAULTS = {
    "num_buckets": 10,
    "gate_scale": 1.0,
    "progress_scale": 1.0,
    "synthesis_weight": 0.5,
    "psi_std": 1.0,
    "stabilizer": 1e-6,
    "progress_noise_floor": 1e-6,
    "gate": True,
    "anchor": True,
    "norm": True,
}


def rollouts(rewards, lengths=None, tokens=12, seed=0, dtype=torch.float64):
    """Random signals of ``len(rewards)`` responses; the first ``lengths[i]`` tokens of response i are active."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(rewards)
    if lengths is None:
        lengths = torch.randint(1, tokens + 1, (rows,), generator=generator).tolist()

    def noise(scale):
        return torch.randn(rows, tokens, generator=generator, dtype=torch.float64) * scale

    logps = -noise(1.0).abs()
    return {
        "entropies": noise(0.8).abs().to(dtype),
        "logps": logps.to(dtype),
        "ref_logps": (logps + noise(0.3)).to(dtype),
        "mask": torch.arange(tokens) < torch.tensor(lengths)[:, None],
        "rewards": torch.tensor(rewards, dtype=dtype),
    }


def compute(case, num_generations=None, **options) -> ERPOSignals:
    return erpo_advantages(**case, num_generations=num_generations or len(case["rewards"]), **options)


def by_loops(case, **options):
    """One group, token by token, from eqs. 3 and 7-10; no tensor operation."""
    o = DEFAULTS | options
    entropies, logps, ref_logps, mask = (case[name].tolist() for name in ("entropies", "logps", "ref_logps", "mask"))
    rewards = case["rewards"].tolist()
    scored = [r for r in rewards if not math.isnan(r)]
    mean_r = sum(scored) / len(scored)
    std_r = math.sqrt(sum((r - mean_r) ** 2 for r in scored) / (len(scored) - 1))
    tolerance = 1e-6 * max(1.0, *(abs(r) for r in scored))
    advantage = [
        0.0 if math.isnan(r) or abs(r - mean_r) <= tolerance else (r - mean_r) / (std_r + 1e-4) for r in rewards
    ]
    where = [(i, t) for i, row in enumerate(mask) for t, m in enumerate(row) if m and not math.isnan(rewards[i])]

    def moments(values):
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))

    mean_h, std_h = moments([entropies[i][t] for i, t in where])
    bucket, members = {}, {}
    for i, row in enumerate(mask):
        active = [t for t, m in enumerate(row) if m and (i, t) in where]
        for position, t in enumerate(active):
            bucket[i, t] = position * o["num_buckets"] // len(active)
            members.setdefault(bucket[i, t], []).append((i, t))
    progress = {(i, t): o["progress_scale"] * (logps[i][t] - ref_logps[i][t]) for i, t in where}
    gate, normalized, raw = {}, {}, {}
    for i, t in where:
        gate[i, t] = 1 / (1 + math.exp(-o["gate_scale"] * (entropies[i][t] - mean_h) / (std_h + o["stabilizer"])))
        if not o["gate"]:
            gate[i, t] = 1.0
        inside = [progress[at] for at in members[bucket[i, t]]]
        mean_k, std_k = moments(inside)
        silent = len(inside) == 1 or std_k <= o["progress_noise_floor"]
        normalized[i, t] = 0.0 if silent else (progress[i, t] - mean_k) / (std_k + o["stabilizer"])
        sign = math.copysign(1.0, advantage[i]) if advantage[i] else 0.0
        raw[i, t] = gate[i, t] * (sign if o["anchor"] else abs(sign)) * normalized[i, t]
    _, spread = moments([raw[at] for at in where if advantage[at[0]]])
    psi = {at: o["psi_std"] * raw[at] / (spread + o["stabilizer"]) for at in where}
    combined = {at: advantage[at[0]] + o["synthesis_weight"] * psi[at] for at in where}
    mean_c, std_c = moments(list(combined.values()))
    final = {at: (c - mean_c) / (std_c + o["stabilizer"]) if o["norm"] else c for at, c in combined.items()}
    terms = {"gates": gate, "progress": progress, "normalized_progress": normalized, "psi": psi, "advantages": final}
    dense = {
        name: torch.tensor(
            [[values.get((i, t), 0.0) for t in range(len(row))] for i, row in enumerate(mask)], dtype=torch.float64
        )
        for name, values in terms.items()
    }
    dense["buckets"] = torch.tensor([[bucket.get((i, t), -1) for t in range(len(row))] for i, row in enumerate(mask)])
    return dense | {"group_advantages": torch.tensor(advantage, dtype=torch.float64)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_buckets": 1},
        {"num_buckets": 3, "gate_scale": 4.0, "progress_scale": 0.1},
        {"synthesis_weight": 2.0, "psi_std": 0.3, "stabilizer": 1e-2},
        {"progress_noise_floor": 0.25},
        {"gate": False},
        {"anchor": False},
        {"norm": False},
        {"gate": False, "anchor": False, "norm": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("rewards", [[1, 0, 0, 1, 0], [0.0, 0.2, 0.7, 1.2, -3.0], [1, 0, math.nan, 0.5, 1]], ids=str)
def test_every_term_equals_the_loops(rewards, options):
    for seed in range(3):
        case = rollouts(rewards, seed=seed)
        signals = compute(case, **options)
        for name, expected in by_loops(case, **options).items():
            torch.testing.assert_close(getattr(signals, name), expected, atol=1e-9, rtol=1e-9, msg=name)


def test_every_field_is_compared_with_the_loops():
    assert {field.name for field in dataclasses.fields(ERPOSignals)} == set(by_loops(rollouts([0, 1])))


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 30])
def test_buckets_count_active_tokens_from_zero_and_stay_below_their_number(length):
    case = rollouts([0, 1], [length, length], tokens=30)
    buckets = compute(case, num_buckets=10).buckets[0, :length].tolist()
    assert buckets == [t * 10 // length for t in range(length)]
    assert buckets[0] == 0
    assert buckets[-1] <= 9


def test_tokens_masked_out_in_the_middle_are_not_counted():
    case = rollouts([0, 1], [12, 12])
    case["mask"][0, 3:7] = False
    signals = compute(case, num_buckets=4)
    assert signals.buckets[0].tolist() == [0, 0, 1, -1, -1, -1, -1, 1, 2, 2, 3, 3]
    assert (signals.advantages[0, 3:7] == 0).all()


def test_group_advantages_are_those_of_trl():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.2, 0.9, 0.9, 0.1])
    case = rollouts(rewards.tolist())
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # GRPOTrainer, scale_rewards="group"
    torch.testing.assert_close(compute(case).group_advantages.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", range(4))
def test_a_reward_at_the_mean_has_neither_advantage_nor_psi(dtype, middle):
    rewards = [0.0, 0.2, 0.7, 1.2]
    rewards.insert(middle, sum(rewards) / 4)
    signals = compute(rollouts(rewards, dtype=dtype))
    assert signals.group_advantages[middle] == 0
    assert (signals.psi[middle] == 0).all()
    assert (signals.group_advantages != 0).sum() == 4


@given(
    parts=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.0, 1e3]), min_size=1, max_size=6),
    copies=st.integers(1, 16),
    shuffles=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_rewards_equal_up_to_rounding_give_exact_zeros(parts, copies, shuffles):
    rewards = []
    for _ in range(copies):
        shuffles.shuffle(parts)
        total = torch.zeros(())
        for part in parts:
            total = total + part
        rewards.append(total.item())
    signals = compute(rollouts(rewards, dtype=torch.float32))
    for values in (signals.group_advantages, signals.psi, signals.advantages):
        assert (values == 0).all()


def test_responses_with_tokens_that_share_one_reward_are_dead_although_another_reward_differs():
    signals = compute(rollouts([1, 1, 0], [5, 7, 0]))
    assert (signals.group_advantages != 0).all()
    assert (signals.psi == 0).all()
    assert (signals.advantages == 0).all()


def test_without_shaping_a_group_of_one_outcome_is_dead_and_the_others_are_as_they_were():
    """``dead_group_on: outcome``: outcomes that differ by rounding alone are one outcome; NaN is left out."""
    shaped, decided, unjudged = [0.2, 0.0, 0.1, 0.2], [1.2, 0.0, 0.2, 0.2], [1.0, math.nan, 0.2, 1.2]
    outcomes = torch.tensor([0.7, 0.7 + 1e-8, 0.7, 0.7, 1, 0, 0, 0, 1, math.nan, 0, 1], dtype=torch.float64)
    case = rollouts(shaped + decided + unjudged, seed=5)
    dead, *live = (compute({name: v[i : i + 4] for name, v in case.items()}) for i in (0, 4, 8))
    assert (dead.advantages != 0).any(), "it lives through shaping"
    found = compute(case | {"rewards": without_shaping(case["rewards"], outcomes, 4)}, num_generations=4)
    for values in (found.group_advantages, found.psi, found.advantages):
        assert (values[:4] == 0).all()
    for place, expected in zip((4, 8), live, strict=True):
        torch.testing.assert_close(found.advantages[place : place + 4], expected.advantages)
        reference = by_loops({name: v[place : place + 4] for name, v in case.items()})
        torch.testing.assert_close(found.psi[place : place + 4], reference["psi"], atol=1e-9, rtol=1e-9)


def test_a_response_without_a_reward_is_left_out_of_everything():
    case = rollouts([1, 0, math.nan, 0.5], seed=3)
    signals = compute(case)
    kept = [0, 1, 3]
    without = compute({name: value[kept] for name, value in case.items()})
    assert signals.group_advantages[2] == 0
    assert (signals.buckets[2] == -1).all()
    assert (signals.advantages[2] == 0).all()
    torch.testing.assert_close(signals.advantages[kept], without.advantages)


def test_no_reward_at_all_and_no_token_at_all_give_zeros():
    for case in (rollouts([math.nan, math.nan]), rollouts([1, 0], [0, 0]), rollouts([1])):
        for field in dataclasses.fields(ERPOSignals):
            values = getattr(compute(case), field.name)
            assert values.isfinite().all()
        assert (compute(case).advantages == 0).all()


def test_a_fresh_adapter_has_no_progress_and_erpo_is_normalized_grpo():
    case = rollouts([1, 0, 0, 1], [6, 6, 6, 6])
    case["ref_logps"] = case["logps"] + 1e-9 * case["ref_logps"]
    signals = compute(case)
    assert (signals.normalized_progress == 0).all()
    assert (signals.psi == 0).all()
    grpo = signals.group_advantages
    torch.testing.assert_close(signals.advantages[:, 0], grpo / grpo.std(correction=0), atol=1e-5, rtol=1e-5)


def test_a_noise_floor_silences_buckets_below_it_only():
    case = rollouts([1, 0], [8, 8], tokens=8)
    case["ref_logps"] = case["logps"].clone()
    case["ref_logps"][:, 4:] += torch.tensor([[0.3, -0.2, 0.1, 0.0], [0.0, 0.4, -0.3, 0.2]])
    case["ref_logps"][:, :4] += 0.01 * torch.tensor([[1.0, -1.0, 0.0, 1.0], [0.0, 1.0, -1.0, 0.5]])
    z = compute(case, num_buckets=2, progress_noise_floor=0.02).normalized_progress
    assert (z[:, :4] == 0).all()
    assert (z[:, 4:] != 0).all()


def test_moving_statistics_replace_those_of_the_group():
    case = rollouts([1, 0, 1])
    gates = compute(case, gate_scale=2.0, entropy_mean=0.5, entropy_std=0.25).gates
    expected = torch.sigmoid(2.0 * (case["entropies"] - 0.5) / 0.25) * case["mask"]
    torch.testing.assert_close(gates, expected, atol=1e-4, rtol=1e-4)


def test_rounding_below_zero_entropy_is_zero_entropy():
    case = rollouts([1, 0])
    case["entropies"][0, 0] = -5e-5
    low = compute(case)
    case["entropies"][0, 0] = 0
    torch.testing.assert_close(low.advantages, compute(case).advantages)


# ------------------------------------------------------------------------------------------------- invariants

reward = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.2, 0.7, 1.2, -1.0])
groups = st.builds(
    rollouts,
    rewards=st.lists(reward, min_size=2, max_size=10),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
invariant = settings(max_examples=80, deadline=None)


def is_live(case) -> bool:
    counted = case["rewards"][case["mask"].any(1)]
    return bool(counted.numel()) and bool(counted.max() - counted.min() > 1e-6)


@given(case=groups)
@invariant
def test_a_live_group_sums_to_zero_with_variance_one_and_any_other_is_zero(case):
    advantages = compute(case).advantages[case["mask"]]
    assert advantages.isfinite().all()
    if not is_live(case):
        assert (advantages == 0).all()
        return
    assert abs(advantages.sum()) <= 1e-4 * advantages.numel()
    assert abs(advantages.var(correction=0) - 1) <= 1e-3


@given(case=groups)
@invariant
def test_the_sign_of_psi_is_the_outcome_times_the_progress(case):
    signals = compute(case)
    if is_live(case):
        expected = signals.group_advantages.sign()[:, None] * signals.normalized_progress.sign()
        assert (signals.psi.sign() == expected).all()


@given(case=groups, permutation_seed=st.integers(0, 1000))
@invariant
def test_permuting_the_responses_permutes_the_result(case, permutation_seed):
    order = torch.randperm(len(case["rewards"]), generator=torch.Generator().manual_seed(permutation_seed))
    permuted = compute({name: value[order] for name, value in case.items()})
    torch.testing.assert_close(permuted.advantages, compute(case).advantages[order], atol=1e-9, rtol=1e-9)


@given(case=groups, left=st.integers(0, 5), right=st.integers(0, 5))
@invariant
def test_padding_changes_nothing_whatever_it_holds(case, left, right):
    rubbish = {"entropies": math.nan, "logps": -math.inf, "ref_logps": math.nan, "mask": False}
    padded = {
        name: torch.nn.functional.pad(value, (left, right), value=rubbish[name]) if name in rubbish else value
        for name, value in case.items()
    }
    tokens = case["mask"].shape[1]
    got = compute(padded).advantages
    torch.testing.assert_close(got[:, left : left + tokens], compute(case).advantages, atol=1e-9, rtol=1e-9)
    assert (got[:, :left] == 0).all()
    assert (got[:, left + tokens :] == 0).all()


@given(
    rewards=st.lists(st.lists(reward, min_size=4, max_size=4), min_size=2, max_size=4),
    seed=st.integers(0, 10_000),
)
@invariant
def test_groups_do_not_see_each_other(rewards, seed):
    case = rollouts([r for group in rewards for r in group], seed=seed)
    together = compute(case, num_generations=4)
    for start in range(0, 4 * len(rewards), 4):
        alone = compute({name: value[start : start + 4] for name, value in case.items()})
        torch.testing.assert_close(together.advantages[start : start + 4], alone.advantages, atol=1e-9, rtol=1e-9)


@given(case=groups, scale=st.floats(0.5, 50))
@invariant
def test_scaling_the_rewards_changes_nothing_but_through_the_stabilizer(case, scale):
    scaled = compute(case | {"rewards": case["rewards"] * scale}).advantages
    torch.testing.assert_close(scaled, compute(case).advantages, atol=5e-3, rtol=5e-3)


def test_rewards_whose_squares_are_none_of_float32s_numbers_give_what_small_ones_give():
    small, large = ([1.0 * scale, 0.0, 3.0 * scale, 2.0 * scale] for scale in (1.0, 1e30))
    expected = compute(rollouts(small, dtype=torch.float32)).advantages
    found = compute(rollouts(large, dtype=torch.float32)).advantages
    assert found.count_nonzero()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@given(case=groups)
@invariant
def test_without_synthesis_one_bucket_and_equal_lengths_it_is_grpo_up_to_one_factor(case):
    case["mask"] = torch.ones_like(case["mask"])
    signals = compute(case, synthesis_weight=0.0, num_buckets=1)
    grpo = signals.group_advantages[:, None].expand_as(signals.advantages)
    spread = grpo.std(correction=0)
    torch.testing.assert_close(signals.advantages * spread, grpo * is_live(case), atol=1e-5, rtol=1e-5)


@given(case=groups)
@invariant
def test_float32_agrees_with_float64(case):
    narrow = {name: value.float() if value.is_floating_point() else value for name, value in case.items()}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in narrow.items()}
    expected = compute(wide)
    inside = [expected.progress[expected.buckets == k] for k in range(10)]
    spreads = [progress.std(correction=0) for progress in inside if progress.numel() > 1]
    assume(not any(spread < 1e-2 for spread in spreads))  # tokens that happen to coincide: a z-score of rounding
    error = (compute(narrow).advantages.double() - expected.advantages).abs()
    assert (error <= 1e-5 * expected.advantages.abs().clamp(min=1)).all()


def test_the_result_carries_no_gradient():
    case = rollouts([1, 0, 1])
    case["logps"].requires_grad_()
    assert not compute(case).advantages.requires_grad


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropies": torch.zeros(4, 11)}, "entropies"),
        ({"logps": torch.zeros(3, 12)}, "logps"),
        ({"ref_logps": torch.zeros(12)}, "ref_logps"),
        ({"rewards": torch.zeros(3)}, "rewards"),
        ({"rewards": torch.zeros(4, 1)}, "rewards"),
        ({"num_generations": 3}, "num_generations"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_buckets": 0}, "num_buckets"),
        ({"entropies": torch.full((4, 12), -0.01)}, "entropies"),
        ({"entropies": torch.full((4, 12), math.nan)}, "entropies"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_with_the_argument_named(change, message):
    arguments = rollouts([1, 0, 0, 1]) | {"num_generations": 4} | change
    with pytest.raises(ValueError, match=rf"^{message}"):
        erpo_advantages(**arguments)


def test_a_mask_that_is_not_two_dimensional_is_refused():
    case = {name: torch.zeros(4) for name in ("entropies", "logps", "ref_logps", "mask", "rewards")}
    with pytest.raises(ValueError, match=r"^mask"):
        erpo_advantages(**case, num_generations=4)


@pytest.mark.parametrize("shape", [(4, 0), (0, 12)])
def test_without_any_token_there_is_no_advantage(shape):
    case = {name: torch.zeros(shape) for name in ("entropies", "logps", "ref_logps", "mask")}
    found = erpo_advantages(**case, rewards=torch.arange(float(shape[0])), num_generations=4)
    assert found.group_advantages.tolist() == [0.0] * shape[0]
    assert {value.shape for name, value in vars(found).items() if name != "group_advantages"} == {shape}

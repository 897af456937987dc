"""The names of a training run's metrics and what they mean. Light: the service shows them beside the curves."""

import re
from collections.abc import Sequence
from itertools import chain, count

_MAX_LABEL = 80
METRICS: dict[str, str] = {
    "loss": "Loss of eqs. 4 and 5, summed over the step.",
    "reward": "Mean weighted reward.",
    "reward_std": "Standard deviation of the rewards of all answers (Bessel), as TRL has it.",
    "erpo/group_reward_std": "Mean over groups of the standard deviation inside a group (Bessel): that of eq. 3.",
    "entropy": "Mean entropy of the sampling distribution, nats a token.",
    "entropy/p05": "5th percentile of the token entropies.",
    "entropy/p50": "Their median.",
    "entropy/p95": "Their 95th percentile.",
    "kl": "k3 estimate of KL(policy || reference), mean over tokens.",
    "kl/exact": "KL(policy || reference) over the whole vocabulary, mean over tokens; of a generation's first update.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of the step.",
    "clip_ratio/low_mean": "Share of tokens clipped at 1 - epsilon.",
    "clip_ratio/high_mean": "Share of tokens clipped at 1 + epsilon_high.",
    "clip_ratio/region_mean": "Share of tokens clipped at either bound.",
    "mean_token_accuracy": "Share of the solutions' tokens that the model ranks first (sft).",
    "num_tokens": "Tokens read and sampled since the start, prompts included.",
    "num_active_tokens": "Tokens that carry loss, mean over the micro-batches.",
    "tokens_per_second": "Sampled tokens per second of the whole step.",
    "memory/peak_bytes": "Peak memory: of the device on CUDA, of the process on the CPU.",
    "completions/sampled_tokens": "Tokens of all answers of a generation.",
    "completions/mean_length": "Mean length of the answers, tokens.",
    "completions/min_length": "Shortest answer.",
    "completions/max_length": "Longest answer.",
    "completions/clipped_ratio": "Share of answers cut at the length limit.",
    "completions/mean_terminated_length": "Mean length of the answers that ended by themselves.",
    "completions/min_terminated_length": "Shortest of those.",
    "completions/max_terminated_length": "Longest of those.",
    "completions/right_wrong_length_ratio": "Mean length of right answers over that of wrong ones.",
    "time/generate": "Seconds in sampling.",
    "time/rewards": "Seconds in reward functions.",
    "time/reference": "Seconds in the reference's forward.",
    "time/forward": "Seconds in the policy's forward, both models' head included.",
    "time/noise": "Seconds in measuring the noise of the progress signal.",
    "time/backward": "Seconds in the backward and the rest of the step.",
    "time/evaluate": "Seconds in evaluating the policy; no part of time/step.",
    "time/log": "Seconds in counting and reporting the step before.",
    "time/step": "Seconds from one report to the next.",
    "sampling/resample_rounds": "Rounds in which prompts without contrast gave way to others (dynamic_sampling).",
    "sampling/skipped_prompts": "Prompts that were answered and not trained on.",
    "sampling/resampled_tokens": "Tokens of the answers sampled in those rounds.",
    "sampling/logp_difference_mean": "Mean |engine log-prob - trainer log-prob| of the sampled tokens.",
    "sampling/logp_difference_max": "Largest such difference.",
    "sampling/importance_sampling_ratio/mean": "Mean factor by which the correction for vLLM weighs a token's loss.",
    "sampling/importance_sampling_ratio/min": "Smallest such factor.",
    "sampling/importance_sampling_ratio/max": "Largest such factor.",
    "sampling/importance_sampling_ratio/clipped": "Share of tokens whose ratio was outside the bounds.",
    "erpo/frac_dead_groups": "Share of groups whose rewards are all equal: no policy gradient.",
    "erpo/frac_no_contrast": "Share of groups with unequal rewards but no advantage.",
    "erpo/frac_all_right": "Share of groups whose outcomes are all right.",
    "erpo/frac_all_wrong": "Share of groups whose outcomes are all wrong.",
    "erpo/frac_live_by_shaping": "Share of groups alive through other rewards than the outcome alone.",
    "erpo/frac_silent_buckets": "Share of buckets whose progress is no more than noise.",
    "erpo/progress_std": "Standard deviation of the progress s (eq. 7).",
    "erpo/progress_snr": "That, over the measured noise; absent where none is measured, or it is 0.",
    "erpo/progress_noise": "Standard deviation of s that rounding alone makes (progress_noise_floor auto).",
    "erpo/gate_mean_top5": "Mean gate W (eq. 8) on the 5% of tokens of highest entropy.",
    "erpo/gate_mean_bottom5": "Mean gate on the 5% of lowest entropy.",
    "erpo/psi_std": "Standard deviation of Psi (eq. 10) on the tokens that have it.",
    "erpo/share_flipped_right": "Share of the tokens of better answers with a negative advantage.",
    "erpo/share_flipped_wrong": "Share of the tokens of worse answers with a positive advantage.",
    "erpo/max_abs_advantage": "Largest |advantage|.",
    "erpo/advantage_sum_residual": "Largest |mean advantage| of a live group; 0 by eq. 16.",
    "erpo/advantage_var_residual": "Largest distance of a live group's variance from 1; 0 by eq. 16.",
    "erpo/advantage_sum_residual_applied": "The same after clipping: of what the optimiser got, where a step has "
    "whole groups.",
    "erpo/advantage_var_residual_applied": "The same after clipping: of what the optimiser got, where a step has "
    "whole groups.",
    "erpo/credit_on_top20_entropy": "Share of |advantage| on the 20% of tokens of highest entropy.",
    "erpo/skipped_steps": "Steps without an update so far, because the gradient was not finite.",
}
_FAMILIES = {
    "rewards/": "Mean of the reward function {}.",
    "verdict/": "Share of answers whose check ended {}.",
}
_EVALUATION = {
    "acc": "Share of right answers of the policy to {}.",
    "fmt": "Share of its answers to {} with a box.",
    "mean_length": "Mean length of its answers to {}, tokens.",
    "truncated": "Share of its answers to {} cut at the length limit.",
}


def benchmark_labels(datasets: Sequence[str]) -> list[str]:
    """What the benchmarks of a training are called in the names of its metrics: ``math500`` for ``math500?level=5``.

    One that would be called like an earlier one gets a number: ``math500_2``.
    """
    names = []
    for dataset in datasets:
        plain = dataset.partition("?")[0].removeprefix("reasoning-gym:").removeprefix("data:").removesuffix(".jsonl")
        names.append(re.sub(r"[^\w./@-]", "_", plain)[-_MAX_LABEL:])
    return told_apart(names)


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, each that an earlier one has with a number: ``name_2``."""
    labels: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        labels.append(next(label for label in chain([name], numbered) if label not in labels))
    return labels


def describe(name: str) -> str | None:
    """What a metric means; None for a name that no run reports."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("eval/"):
        label, _, field = name.removeprefix("eval/").rpartition("/")
        text = f"Unbiased {field} of the policy on {{}}." if field.startswith("pass@") else _EVALUATION.get(field)
        return text and text.format(label)
    for prefix, text in _FAMILIES.items():
        if name.startswith(prefix):
            return text.format(name.removeprefix(prefix))
    return None

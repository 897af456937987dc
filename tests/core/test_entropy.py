"""Entropy analysis of a tiny model: its numbers against float64, its alignment, its pivots and its refusals."""

from base64 import b64encode
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from erpo_core.analysis.detectors import find_pivots  # noqa: E402
from erpo_core.analysis.entropy import run_entropy  # noqa: E402
from erpo_core.analysis.tokens import display_tokens  # noqa: E402
from erpo_core.codec import decode_trace  # noqa: E402
from erpo_core.errors import SpecError  # noqa: E402
from erpo_core.job import JobInputs, ModelInput  # noqa: E402
from erpo_core.prompts import prompt_ids  # noqa: E402
from erpo_core.records import Result, Trace, from_wire, to_wire  # noqa: E402
from erpo_core.specs.entropy import DetectorSpec, EntropySpec  # noqa: E402
from tiny_model import make_tiny_model, make_tiny_tokenizer  # noqa: E402

RUNNING = SimpleNamespace(requested=False)
HALF = 2**-11
"""Relative error of float16, in which every channel but entropy is stored."""
TEXTS = [
    {"prompt": "What is 17 + 25?", "response": "17 + 25 = 42, so the answer is \\boxed{42}."},
    {"prompt": "Say it in Greek.", "response": "ἀεί — 永遠 🙂 done"},
]


class Memory:
    """A sink that keeps what would go over the wire."""

    def __init__(self) -> None:
        self.records = []

    def emit(self, record) -> None:
        self.records.append(from_wire(*to_wire(record)))

    def of(self, kind) -> list:
        return [record for record in self.records if isinstance(record, kind)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def inputs(tiny, adapter=None, **changes) -> JobInputs:
    return JobInputs(
        **changes,
        job_id="job_1",
        run_id="run_1",
        attempt=1,
        work_dir=tiny.parent / "work",
        cache_dir=tiny.parent / "cache",
        model=ModelInput(str(tiny), adapter_path=adapter),
        model_roots=(tiny.parent,),
    )


def analyse(job_inputs, **body) -> tuple[list[Trace], dict]:
    """The traces and the summary of one analysis; a trace that is sent again takes the place of the first."""
    sink = Memory()
    spec = EntropySpec.model_validate({"model": job_inputs.model.base, **body})
    run_entropy(spec, job_inputs, sink, RUNNING)
    last = {(trace.meta["prompt_id"], trace.meta["sample"]): trace for trace in sink.of(Trace)}
    return list(last.values()), sink.of(Result)[0].data


def by_hand(path, spec: EntropySpec, text, temperature: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(H, log p, token ids) of one response: plain transformers, logits whole, float64."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64),
        AutoTokenizer.from_pretrained(path),
    )
    prompt = prompt_ids(tokenizer, text["prompt"], spec.prompt)
    answer = tokenizer(text["response"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    logps = (logits / temperature).log_softmax(1)
    entropies = -(logps.exp() * logps).sum(1)
    return entropies.numpy(), logps[range(len(answer)), answer].numpy(), answer


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_and_log_probability_equal_a_float64_recomputation(tiny, temperature):
    traces, summary = analyse(inputs(tiny), texts=TEXTS, temperature=temperature)
    spec = EntropySpec.model_validate({"model": str(tiny), "texts": TEXTS})
    assert summary["num_sequences"] == len(traces) == len(TEXTS)
    for trace, text in zip(traces, TEXTS, strict=True):
        columns = decode_trace(trace.payload)
        entropies, logps, answer = by_hand(tiny, spec, text, temperature)
        assert columns["token_ids"].tolist() == answer
        np.testing.assert_allclose(columns["entropy"], entropies, atol=1e-4)
        np.testing.assert_allclose(columns["logp"], logps, rtol=HALF)


def test_the_tokens_of_a_page_are_the_text(tiny):
    traces, _ = analyse(inputs(tiny), texts=TEXTS)
    for trace, text in zip(traces, TEXTS, strict=True):
        assert "".join(trace.meta["tokens"]) == text["response"] == trace.meta["completion"]
        assert len(trace.meta["tokens"]) == trace.meta["num_tokens"] == len(text["response"].encode())


def test_a_character_of_several_tokens_sits_on_the_first():
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("a🙂b永", add_special_tokens=False)["input_ids"]
    assert display_tokens(tokenizer, ids) == ["a", "🙂", "", "", "", "b", "永", "", ""]


def test_half_a_character_stays_a_replacement_character():
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("🙂x", add_special_tokens=False)["input_ids"]
    assert display_tokens(tokenizer, ids[2:]) == ["\ufffd", "\ufffd", "x"]


def test_pivots_are_the_tokens_of_highest_entropy_with_their_alternatives(tiny):
    detector = {"kind": "quantile", "fraction": 0.1}
    traces, summary = analyse(inputs(tiny), texts=TEXTS, detector=detector, top_k_alternatives=3)
    for trace in traces:
        entropies = decode_trace(trace.payload)["entropy"]
        pivots = trace.meta["pivots"]
        assert len(pivots) == -(-len(entropies) // 10)
        highest = np.sort(entropies)[-len(pivots) :]
        np.testing.assert_allclose(sorted(p["entropy"] for p in pivots), highest)
        for pivot in pivots:
            logps = [alternative["logp"] for alternative in pivot["alternatives"]]
            assert len(logps) == 3
            assert logps == sorted(logps, reverse=True)
            assert pivot["token"] == trace.meta["tokens"][pivot["position"]]
    assert summary["num_pivots"] == sum(len(trace.meta["pivots"]) for trace in traces)


def test_the_best_alternative_is_the_token_of_rank_zero(tiny):
    traces, _ = analyse(inputs(tiny), prompts=["What is 2 + 2?"], sampling={"max_completion_length": 24}, num_samples=3)
    found = 0
    for trace in traces:
        columns = decode_trace(trace.payload)
        for pivot in trace.meta["pivots"]:
            best = pivot["alternatives"][0]
            chosen = columns["token_ids"][pivot["position"]] == best["token_id"]
            assert chosen == (columns["rank"][pivot["position"]] == 0)
            assert best["logp"] == pytest.approx(np.log(columns["top_prob"][pivot["position"]]), abs=2 * HALF)
            found += 1
    assert found >= len(traces) == 3


def test_sampled_answers_are_the_same_for_the_same_seed(tiny):
    body = {"prompts": ["What is 2 + 2?"], "num_samples": 2, "sampling": {"max_completion_length": 12, "seed": 5}}
    first, _ = analyse(inputs(tiny), **body)
    second, _ = analyse(inputs(tiny), **body)
    assert [t.payload for t in first] == [t.payload for t in second]
    assert [(t.meta["group"], t.meta["sample"]) for t in first] == [(0, 0), (0, 1)]


def test_progress_of_an_adapter_is_its_distance_to_the_base(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    base, _ = analyse(inputs(tiny), texts=TEXTS)
    adapter, _ = analyse(inputs(tiny, adapter=tmp_path / "adapter"), texts=TEXTS)
    for plain, trained in zip(base, adapter, strict=True):
        before, after = decode_trace(plain.payload), decode_trace(trained.payload)
        assert "progress" not in before
        assert np.abs(after["progress"]).max() > 0.01
        rounding = 3 * HALF * np.abs(after["logp"]).max()
        np.testing.assert_allclose(after["progress"], after["logp"] - before["logp"], atol=rounding)


def test_special_tokens_are_never_pivots_and_not_counted(tiny):
    text = {"prompt": "Stop.", "response": "ok<|im_end|>"}
    traces, summary = analyse(inputs(tiny), texts=[text], detector={"kind": "absolute", "threshold": 0.0})
    assert [pivot["token"] for pivot in traces[0].meta["pivots"]] == ["o", "k"]
    assert summary["num_tokens"] == 2


def test_a_text_beyond_the_context_is_refused_by_its_place(tiny):
    texts = [TEXTS[0], {"prompt": "Count.", "response": "x" * 5000}]
    with pytest.raises(SpecError, match="context holds 4096") as refused:
        analyse(inputs(tiny), texts=texts)
    assert refused.value.pointer == "/texts/1/response"


def test_a_stop_ends_the_analysis_without_a_result(tiny):
    sink = Memory()
    spec = EntropySpec.model_validate({"model": str(tiny), "texts": TEXTS})
    assert run_entropy(spec, inputs(tiny), sink, SimpleNamespace(requested=True)) == {"stopped": True}
    assert not sink.of(Trace)
    assert not sink.of(Result)


def test_stored_answers_are_scored_under_the_prompt_that_they_were_sampled_with(tiny):
    answers = [{"prompt": text["prompt"], "completion": text["response"], "gold": "42"} for text in [*TEXTS, TEXTS[0]]]
    answers.append({"prompt": "An end only.", "completion": "", "gold": None})
    source = {"prompt_spec": {"template": "raw"}, "answers": answers}
    given = inputs(tiny, source=source)
    traces, summary = analyse(given, source={"run": "run_" + "0" * 32})
    expected, _ = analyse(inputs(tiny), texts=TEXTS, prompt={"template": "raw"})
    assert summary["num_sequences"] == 3
    assert [(t.meta["group"], t.meta["sample"], t.meta["gold"], t.meta["verdict"]) for t in traces] == [
        (0, 0, "42", "right"),
        (1, 0, "42", "unparsable"),
        (0, 1, "42", "right"),
    ]
    assert {t.meta["verdict"] for t in expected} == {None}
    assert [t.payload for t in traces[:2]] == [t.payload for t in expected]


def test_a_benchmark_gives_problems_and_right_answers(tiny):
    (tiny.parent / "two.jsonl").write_text(
        '{"problem": "1 + 1?", "answer": "2"}\n{"problem": "2 + 2?", "answer": "4"}\n'
    )
    body = {"dataset": "data:two.jsonl", "num_samples": 2, "sampling": {"max_completion_length": 5}}
    traces, _ = analyse(inputs(tiny, data_root=tiny.parent), **body)
    found = [(t.meta["prompt"], t.meta["gold"], t.meta["sample"]) for t in traces]
    assert found == [("1 + 1?", "2", 0), ("1 + 1?", "2", 1), ("2 + 2?", "4", 0), ("2 + 2?", "4", 1)]
    assert len(analyse(inputs(tiny, data_root=tiny.parent), **body, limit=1)[0]) == 2


def test_pivots_over_all_answers_are_the_same_as_with_all_of_them_in_memory(tiny):
    detector = {"kind": "quantile", "fraction": 0.1, "scope": "run"}
    traces, _ = analyse(inputs(tiny), texts=TEXTS, detector=detector)
    entropies = [decode_trace(trace.payload)["entropy"] for trace in traces]
    expected = find_pivots(entropies, DetectorSpec(**detector))
    assert [[p["position"] for p in t.meta["pivots"]] for t in traces] == [list(found) for found in expected]
    assert all(len(p["alternatives"]) == 5 for t in traces for p in t.meta["pivots"])


class Dying(Memory):
    """A sink whose job dies with one of its traces on the way."""

    def __init__(self, traces: int) -> None:
        super().__init__()
        self.left = traces

    def emit(self, record) -> None:
        if isinstance(record, Trace):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        super().emit(record)


def rows_of(traces: list[Trace]) -> tuple[dict, ...]:
    """What the next attempt is told of stored traces."""
    last = {(trace.meta["prompt_id"], trace.meta["sample"]): trace for trace in traces}
    return tuple(
        {"prompt_id": name, "sample": sample, "blob": b64encode(trace.payload).decode(), "pivots": trace.meta["pivots"]}
        for (name, sample), trace in last.items()
    )


@pytest.mark.parametrize("scope", ["sequence", "run"])
def test_an_analysis_that_dies_anywhere_ends_with_the_same_traces_and_numbers(tiny, scope):
    body = {"prompts": ["1 + 1?", "2 + 2?"], "num_samples": 2, "batch_size": 2}
    body |= {"sampling": {"max_completion_length": 8}, "detector": {"scope": scope, "fraction": 0.06}}
    spec = EntropySpec.model_validate({"model": str(tiny), **body})
    whole, expected = analyse(inputs(tiny), **body)
    count, final = 0, {(t.meta["prompt_id"], t.meta["sample"]): t for t in whole}
    while True:
        dying = Dying(count)
        try:
            run_entropy(spec, inputs(tiny), dying, RUNNING)
        except KeyboardInterrupt:
            pass
        else:
            break
        stored = rows_of(dying.of(Trace))
        again = Memory()
        run_entropy(spec, inputs(tiny, stored_traces=stored), again, RUNNING)
        found = {(t.meta["prompt_id"], t.meta["sample"]): t for t in dying.of(Trace) + again.of(Trace)}
        assert found == final
        assert again.of(Result)[0].data | {"seconds": 0} == expected | {"seconds": 0}
        assert len(dying.of(Trace)) + len(again.of(Trace)) == (4 if scope == "sequence" else 4 + with_pivots(whole))
        count += 1
    assert count == (4 if scope == "sequence" else 4 + with_pivots(whole))


def with_pivots(traces: list[Trace]) -> int:
    return sum(bool(trace.meta["pivots"]) for trace in traces)


def test_a_stored_trace_of_another_text_is_not_taken_for_this_one(tiny):
    first, _ = analyse(inputs(tiny), texts=TEXTS[:1])
    second, _ = analyse(inputs(tiny, stored_traces=rows_of(first)), texts=TEXTS[1:])
    assert second[0].meta["completion"] == TEXTS[1]["response"]


def test_a_sampled_answer_that_could_outgrow_the_context_is_refused_before_it_is_sampled(tiny):
    with pytest.raises(SpecError, match="do not fit") as refused:
        analyse(inputs(tiny), prompts=["1 + 1?"], sampling={"max_completion_length": 4090})
    assert refused.value.pointer == "/sampling/max_completion_length"


def test_a_response_with_turns_of_its_own_is_refused(tiny):
    text = {"prompt": "Stop.", "response": "ok<|im_end|>\nand on"}
    with pytest.raises(SpecError, match="template") as refused:
        analyse(inputs(tiny), texts=[text])
    assert refused.value.pointer == "/texts/0/response"

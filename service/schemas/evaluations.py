"""Evaluations: problem by problem, compared, and as tables."""

from typing import Any

from pydantic import BaseModel, Field


class Interval(BaseModel):
    """A mean over problems with its 95% bootstrap interval."""

    value: float | None
    low: float | None
    high: float | None


class ProblemRow(BaseModel):
    """One problem of an evaluation and how its answers came out."""

    prompt_id: str
    group: int = Field(description="Its place in the data set.")
    prompt: str
    gold: str | None
    level: str | None
    subject: str | None
    num_samples: int
    num_right: int
    num_boxed: int
    num_truncated: int
    mean_length: float = Field(description="Tokens.")


class Compared(BaseModel):
    """One evaluation less its baseline."""

    evaluation: str
    baseline: str
    acc: Interval
    fmt: Interval
    mean_length: Interval
    pass_at: dict[str, Interval]
    problems: dict[str, int] = Field(description="`better`, `worse` and `equal` problems, by right answers.")
    test: str = Field(description="`mcnemar_exact` or `sign_flip_exact`, on right answers by problem; two-sided.")
    p_value: float
    p_adjusted: float = Field(description="Holm, over every test of this answer.")


class BenchmarkComparison(BaseModel):
    """The evaluations of one benchmark."""

    benchmark: str
    num_problems: int
    num_samples: int
    baseline: str
    evaluations: list[dict[str, Any]]
    comparisons: list[Compared]


class Comparison(BaseModel):
    """Several models on the same benchmarks."""

    benchmarks: list[BenchmarkComparison]
    num_tests: int
    correction: str


class ReportRow(BaseModel):
    """One model. `source`: `run`, or `paper` for numbers as printed there."""

    label: str
    source: str
    cells: dict[str, Interval] = Field(description="By column, in percent.")
    evaluations: dict[str, str] = Field(description="Run id by benchmark.")
    truncated: dict[str, float] = Field(description="Share of answers cut at the length limit, by benchmark.")


class Report(BaseModel):
    """A table in the shape of the paper's Table 1 or 2."""

    table: str
    columns: list[str]
    rows: list[ReportRow]
    notes: list[str]

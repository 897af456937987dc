"""A user's own rewards reach the worker by an entry point; the API sees their names alone."""

import subprocess
import sys

import pytest

from erpo_core.errors import RunError, SpecError
from erpo_core.rewards.functions import check_rewards, known_rewards, reward_functions
from erpo_core.specs.common import RewardSpec

OWN = """
def longest(completions, *, scale=1.0, **kwargs):
    return [scale * len(text) for text in completions]

def divides(completions, **kwargs):
    return [1 / 0 for _ in completions]

def short(completions, **kwargs):
    return [1.0]

def text(completions, **kwargs):
    return ["high" for _ in completions]

def unsure(completions, **kwargs):
    return [None if text == "?" else True for text in completions]

def narrow(completions):
    return [0.0 for _ in completions]

async def later(completions, **kwargs):
    return [0.0 for _ in completions]
"""
NAMES = ("longest", "divides", "short", "text", "unsure", "narrow", "later")


def register(folder, monkeypatch, code: str, module: str = "own_rewards", **entries: str) -> None:
    """An installed package, as an installer leaves it: a module and its metadata."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("[erpo_lab.rewards]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.fixture
def own(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch, OWN, absent="own_rewards:absent", **{name: f"own_rewards:{name}" for name in NAMES})
    return tmp_path


def one(name: str, **args):
    return reward_functions([RewardSpec(name=name, args=args)], verifier=None)[0]


def test_a_registered_function_is_a_reward_and_gets_its_arguments(own):
    columns = {"prompts": ["p", "p"], "completion_ids": [[1], [2]], "answer": ["1", "2"]}
    assert one("longest")(completions=["ab", "abc"], **columns) == [2.0, 3.0]
    assert one("longest", scale=2)(completions=["ab", "abc"], **columns) == [4.0, 6.0]
    assert one("unsure")(completions=["?", "!"], **columns) == [None, 1.0]
    assert one("longest").__name__ == "longest"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("divides", "the reward divides raised ZeroDivisionError"),
        ("short", "the reward short returned 1 values for 2 completions"),
        ("text", "the reward text raised ValueError"),
    ],
)
def test_what_goes_wrong_in_a_reward_is_told_under_its_name(own, name, told):
    with pytest.raises(RunError, match=told) as caught:
        one(name)(completions=["a", "b"])
    assert caught.value.code == "reward_failed"


@pytest.mark.parametrize(("name", "args"), [("absent", {}), ("narrow", {}), ("narrow", {"scale": 2}), ("later", {})])
def test_a_function_that_cannot_be_called_is_refused_before_training(own, name, args):
    with pytest.raises(RunError, match=f"the reward {name} ") as caught:
        one(name, **args)
    assert caught.value.code == "reward_unavailable"


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(own):
    with pytest.raises(SpecError) as caught:
        check_rewards([RewardSpec(name="accuracy"), RewardSpec(name="vibes")])
    assert (caught.value.pointer, caught.value.code) == ("/rewards/1/name", "unknown_reward")
    assert "'boxed_format'" in caught.value.mend
    assert "'longest'" in caught.value.mend


def test_a_built_in_name_keeps_its_meaning(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch, OWN, accuracy="own_rewards:longest")
    assert next(row for row in known_rewards() if row["name"] == "accuracy")["source"] == "built-in"
    assert one("accuracy").__class__.__name__ == "Accuracy"


def test_names_are_checked_and_listed_without_importing_them(own):
    code = (
        f"import sys; sys.path.insert(0, {str(own)!r})\n"
        "from erpo_core.rewards.functions import check_rewards, known_rewards\n"
        "from erpo_core.specs.common import RewardSpec\n"
        "check_rewards([RewardSpec(name='divides')])\n"
        "print({row['name']: row['source'] for row in known_rewards()}['divides'])\n"
        "print(sorted({'torch', 'own_rewards', 'math_verify'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["own_rewards", "[]"]

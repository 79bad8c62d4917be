"""The builtin length and the user's own function."""

import pytest

from pama_plugin.rewards import Response, load_builtin, load_function


def response(num_tokens: int = 7) -> Response:
    return Response(query="Once more, please", prompt="Once", label="tale", num_tokens=num_tokens)


@pytest.mark.parametrize(("tokens", "reward"), [(35, 0.5), (70, 0.5), (140, 1.0), (210, 1.5), (400, 1.5)])
def test_length_as_in_the_papers_first_experiment(tokens, reward) -> None:
    assert load_builtin("length", {"scale": "140", "min": "0.5", "max": "1.5"})(response(tokens)) == reward


def test_length_counts_tokens_by_default() -> None:
    assert load_builtin("length", {})(response(7)) == 7.0


@pytest.mark.parametrize(
    "body", ["[0.5]", "torch.tensor([0.5])", "{'rewards': torch.tensor([0.5]), 'scores': None}", "0.5"]
)
def test_a_function_gets_what_the_host_gives_it(tmp_path, body) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(
        "import torch\ndef f(queries, prompts, labels):\n"
        "    assert (queries, prompts, labels) == (['Once more, please'], ['Once'], ['tale'])\n"
        f"    return {body}\n"
    )
    assert load_function(f"{file}:f")(response()) == 0.5


def test_two_functions_of_one_file_share_it(tmp_path) -> None:
    """What a file does at import, such as loading a model, is done once; dataclasses in it work."""
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Model:\n    calls: int = 0\n"
        "model = Model()\n"
        "def f(q, p, l):\n    model.calls += 1\n    return [model.calls]\n"
        "def g(q, p, l):\n    model.calls += 1\n    return [model.calls]\n"
    )
    assert load_function(f"{file}:f")(response()) == 1 and load_function(f"{file}:g")(response()) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("None", "returned None"),
        ("{}", "returned None"),
        ("[0.5, 0.5]", "returned 2 rewards for 1 response"),
        ("[]", "returned 0 rewards for 1 response"),
    ],
)
def test_a_function_that_returns_the_wrong_thing(tmp_path, body, message) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(f"def f(queries, prompts, labels):\n    return {body}\n")
    with pytest.raises(ValueError, match=message):
        load_function(f"{file}:f")(response())

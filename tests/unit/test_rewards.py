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

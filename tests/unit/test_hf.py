"""The kind hf: rewards equal the output of transformers for each conversation alone."""

import ast
import functools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import pama_plugin
from pama_plugin.rewards.hf import Conversation, HfScorer
from pama_plugin.rewards.options import HfOptions, check_model

WORDS = ["user:", "assistant:", *(f"w{index}" for index in range(30))]
LONG, PROMPT, RESPONSE = " ".join(WORDS[2:22]), " ".join(WORDS[2:12]), " ".join(WORDS[20:26])
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
GPT2 = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
SIZE = len(WORDS) + 4


def save_tokenizer(folder: Path, special: dict, single: str = "", pair: str = "", template: str = "", **more) -> None:
    """Splits at whitespace; every word and every special token is one token."""
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*special.values(), *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        ids = [(token, vocabulary[token]) for token in special.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more)
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)


def save_bert_tokenizer(folder: Path) -> None:
    names = ["input_ids", "token_type_ids"]  # no mask, although batches need one
    save_tokenizer(folder, BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", model_input_names=names)


def save_model(folder: Path, architecture: str, head: str = "ForSequenceClassification", **config) -> None:
    torch.manual_seed(1)
    settings = getattr(transformers, f"{architecture}Config")(vocab_size=SIZE, **config)
    model = getattr(transformers, architecture + head)(settings)
    for parameter in model.parameters():  # large, so that a wrong token changes the reward
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    names = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    save_model(folder, "Bert", **SMALL, **names, max_position_embeddings=64)
    save_bert_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """The padding token is the EOS at the end of the template; tokenizer and template both add a BOS."""
    folder = tmp_path_factory.mktemp("llama")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    save_model(folder, "Llama", **SMALL, **ids, num_key_value_heads=2, num_labels=1, max_position_embeddings=64)
    save_tokenizer(folder, LLAMA, "<s> $A", "<s> $A <s> $B", TEMPLATE, model_input_names=["input_ids"])
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """No padding token anywhere, and a tokenizer that would pad at the left."""
    folder = tmp_path_factory.mktemp("gpt2")
    names = {"id2label": {0: "Safe", 1: "HARMFUL", 2: "harmful"}, "label2id": {"Safe": 0, "HARMFUL": 1, "harmful": 2}}
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 0}
    save_model(folder, "GPT2", **size, **names)
    save_tokenizer(folder, GPT2, padding_side="left", model_input_names=["input_ids", "attention_mask"])
    return str(folder)


@functools.cache
def load(folder: str) -> tuple:
    return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()


def user(prompt: str, response: str) -> Conversation:
    return Conversation([{"role": "user", "content": prompt}], response)


def plain(folder: str, conversation: Conversation, text: str) -> torch.Tensor:
    """The logits of one conversation, as in the documentation of transformers."""
    tokenizer, model = load(folder)
    prompt, response = conversation.messages[0]["content"], conversation.response
    if text == "chat":
        messages = [*conversation.messages, {"role": "assistant", "content": response}]
        inputs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    else:
        texts = {"full": [prompt + response], "pair": [prompt, response], "response": [response]}[text]
        inputs = tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0]


def of_ids(folder: str, ids: list[int], **more: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)[1](torch.tensor([ids]), **{key: torch.tensor([row]) for key, row in more.items()}).logits[0]


@functools.cache
def scorer(folder: str, **options) -> HfScorer:
    return HfScorer(folder, HfOptions(**options), "cpu")


def ragged(number: int = 9) -> list[Conversation]:
    draw = random.Random(0)
    lengths = [(draw.randint(1, 14), draw.randint(1, 20)) for _ in range(number)]
    return [
        user(" ".join(draw.choices(WORDS[2:], k=prompt)), " " + " ".join(draw.choices(WORDS[2:], k=response)))
        for prompt, response in lengths
    ]


def near(expected: object) -> object:
    return pytest.approx(expected, rel=1e-4, abs=1e-5)


CASES = [
    ("bert", "full", 1),
    ("bert", "pair", 0),
    ("bert", "response", 1),
    ("llama", "chat", 0),
    ("llama", "full", 0),
    ("gpt2", "full", 2),
    ("gpt2", "pair", 1),
    ("gpt2", "response", 0),
]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("model", "text", "label"), CASES)
def test_rewards_equal_transformers_for_each_conversation_alone(request, model, text, label, batch_size) -> None:
    folder, conversations = request.getfixturevalue(model), ragged()
    expected = [float(plain(folder, conversation, text)[label]) for conversation in conversations]
    assert len({round(reward, 3) for reward in expected}) == len(expected)  # otherwise the order is not tested
    rewards = scorer(folder, label=label, text=text, batch_size=batch_size).score(conversations)
    assert rewards == near(expected)


@pytest.mark.parametrize(("model", "text"), [("llama", "full"), ("gpt2", "full"), ("gpt2", "response")])
def test_texts_that_end_with_the_padding_token(request, model, text) -> None:
    folder = request.getfixturevalue(model)
    eos = load(folder)[0].eos_token
    conversations = [user("w1 w2", f" w3 {eos}"), user("w4", f" w5 w6 w7 w8 {eos} {eos}"), user("w9", f" {eos}")]
    expected = [float(plain(folder, conversation, text)[0]) for conversation in conversations]
    assert scorer(folder, label=0, text=text).score(conversations) == near(expected)


def test_a_batch_that_uses_every_id_of_a_model_without_padding(tmp_path) -> None:
    save_model(tmp_path, "GPT2", n_embd=16, n_layer=1, n_head=2, n_positions=48, num_labels=1)
    save_tokenizer(tmp_path, GPT2 | {"sep_token": "[A]", "cls_token": "[B]", "mask_token": "[C]"})
    tokens = list(load(str(tmp_path))[0].get_vocab())
    assert len(tokens) == SIZE
    conversations = [user("", " ".join(tokens)), user("", " ".join(tokens[:5])), user("", "w1 w2 w3")]
    expected = [float(plain(str(tmp_path), conversation, "response")[0]) for conversation in conversations]
    assert scorer(str(tmp_path), text="response").score(conversations) == near(expected)


OTHERS = {
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Roberta": SMALL | {"pad_token_id": 0, "max_position_embeddings": 41},
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": 0},
    "FNet": SMALL | {"type_vocab_size": 2, "max_position_embeddings": 64},
    "Bart": {"d_model": 16, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 2}
    | {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")},
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_architectures_that_treat_padding_differently(tmp_path, architecture) -> None:
    """DistilBERT has no token types, RoBERTa and XLNet other positions, FNet no mask, BART needs equally many EOS."""
    folder = str(tmp_path)
    save_model(tmp_path, architecture, **OTHERS[architecture], num_labels=1)
    save_bert_tokenizer(tmp_path)
    tokenizer, model = load(folder)
    conversations = [*ragged(), user("w1 [SEP]", " w2 w3")]
    expected = []
    for conversation in conversations:
        inputs = tokenizer(conversation.messages[0]["content"] + conversation.response, return_tensors="pt")
        if architecture in ("DistilBert", "Bart"):
            del inputs["token_type_ids"]
        with torch.no_grad():
            expected.append(float(model(**inputs).logits))
    assert scorer(folder, max_length=40).score(conversations) == near(expected)


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class TinyConfig(PretrainedConfig):
    model_type = "tiny"

class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Embedding(40, 1)
        self.post_init()

    def get_input_embeddings(self):
        return self.score

    def forward(self, input_ids, attention_mask):
        return SequenceClassifierOutput(logits=(self.score(input_ids) * attention_mask[..., None]).sum(1))
"""


def test_a_model_with_remote_code(tmp_path, monkeypatch) -> None:
    """It runs only if allowed, and receives only the inputs in its signature."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "modeling.py").write_text(REMOTE)
    classes = {"AutoConfig": "modeling.TinyConfig", "AutoModelForSequenceClassification": "modeling.Tiny"}
    config = {"model_type": "tiny", "auto_map": classes, "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"score.weight": torch.arange(40.0)[:, None]}, tmp_path / "model.safetensors", {"format": "pt"})
    save_bert_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        scorer(str(tmp_path), max_length=9)
    ids = {word: index for index, word in enumerate([*BERT.values(), *WORDS])}
    rewards = scorer(str(tmp_path), max_length=9, trust_remote_code=True).score([user("w1", " w2"), user("w3", "")])
    assert rewards == [2 + ids["w1"] + ids["w2"] + 3, 2 + ids["w3"] + 3]


def test_positions_that_start_after_the_padding_id(tmp_path) -> None:
    save_model(tmp_path, "Roberta", **SMALL, num_labels=1, pad_token_id=0, max_position_embeddings=21)
    save_bert_tokenizer(tmp_path)
    assert math.isfinite(scorer(str(tmp_path)).score([user(LONG, LONG)])[0])
    with pytest.raises(ValueError, match="max_length .*at most 20.*found 21"):
        scorer(str(tmp_path), max_length=21)


def test_a_conversation_that_the_template_refuses_concerns_no_other(gpt2, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['content'] }} {% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(gpt2).save_pretrained(tmp_path)
    model = scorer(str(tmp_path), label=1)
    good = [user("w1", f"w{index}") for index in range(2, 7)]
    bad = Conversation([{"role": "system", "content": "w1"}], "w2")
    none = Conversation([{"role": "user", "content": 3}], "w2")
    first, *rest = model.score_each([good[0], bad, *good[1:], none])
    assert [first, *rest[1:-1]] == near(model.score(good))
    assert "System role not supported" in rest[0] and "not iterable" in rest[-1]


def test_no_conversations(bert) -> None:
    assert scorer(bert, label=1).score([]) == []


def test_empty_texts(bert, gpt2) -> None:
    """An encoder reads its special tokens. A text without tokens has no reward, and does not affect the others."""
    empty, other = user("w1", ""), user("w1", "w2")
    assert scorer(bert, label=1, text="response").score([empty]) == near([float(plain(bert, empty, "response")[1])])
    rewards = scorer(gpt2, label=1, text="response").score([empty, other, empty])
    assert [math.isnan(reward) for reward in rewards] == [True, False, True]
    inspection = scorer(gpt2, label=1, text="response").inspect(empty)
    assert inspection == ("", 0, False, False)
    (reward,) = scorer(bert, label=1, text="pair").score([empty])
    ids = load(bert)[0](["w1"], [""])  # an empty second text still has its separator
    assert ids["input_ids"][0][-2:] == [3, 3]
    expected = of_ids(bert, ids["input_ids"][0], token_type_ids=ids["token_type_ids"][0])
    assert reward == near(float(expected[1]))


def test_the_text_is_chat_if_there_is_a_template_and_full_otherwise(llama, gpt2) -> None:
    assert scorer(llama).inspect(user("w1", "w2"), 99).tail == "<s> user: w1 </s> assistant: w2 </s>"
    assert scorer(gpt2, label=0).inspect(user("w1", " w2"), 99).tail == "w1 w2"


@pytest.mark.parametrize("text", ["chat", "full", "response"])
def test_one_bos(llama, text) -> None:
    tail = scorer(llama, text=text).inspect(user("w1", " w2"), 99).tail
    assert tail.startswith("<s>") and tail.count("<s>") == 1


def test_several_messages(llama, gpt2) -> None:
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    conversation = Conversation([*messages, {"role": "user", "content": "w3"}], " w4")
    tail = scorer(llama).inspect(conversation, 99).tail
    assert tail == "<s> user: w1 </s> assistant: w2 </s> user: w3 </s> assistant: w4 </s>"
    expected = of_ids(gpt2, load(gpt2)[0]("w1\nw2\nw3 w4")["input_ids"])
    assert scorer(gpt2, label=0).score([conversation]) == near([float(expected[0])])


@pytest.mark.parametrize("text", ["chat", "full"])
def test_content_in_parts(llama, text) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "image"}, {"type": "text", "text": "w2 "}]
    conversation = Conversation([{"role": "user", "content": parts}], "w3")
    model = scorer(llama, text=text)
    assert model.score([conversation]) == model.score([user("w1 w2 ", "w3")])


# Truncation


def ids_of(folder: str, text: str) -> list[int]:
    return load(folder)[0](text, add_special_tokens=False)["input_ids"]


def test_a_long_full_text_is_truncated_at_the_beginning_of_the_prompt(bert) -> None:
    model, conversation = scorer(bert, label=1, max_length=11), user(PROMPT, " " + RESPONSE)
    ids = [2, *ids_of(bert, PROMPT)[-3:], *ids_of(bert, RESPONSE), 3]
    assert model.score([conversation]) == near([float(of_ids(bert, ids)[1])])
    assert model.inspect(conversation, 2) == ("w23 [SEP]", 11, True, False)
    assert model.inspect(user("w1 w2 w3", " " + RESPONSE)) == (f"[CLS] w1 w2 w3 {RESPONSE} [SEP]", 11, False, False)


def test_a_long_pair_is_truncated_at_the_beginning_of_the_prompt(bert) -> None:
    model, conversation = scorer(bert, label=1, max_length=11, text="pair"), user(PROMPT, RESPONSE)
    ids = [2, *ids_of(bert, PROMPT)[-2:], 3, *ids_of(bert, RESPONSE), 3]
    expected = of_ids(bert, ids, token_type_ids=[0] * 4 + [1] * 7)
    assert model.score([conversation]) == near([float(expected[1])])
    assert model.inspect(conversation) == (f"[CLS] w8 w9 [SEP] {RESPONSE} [SEP]", 11, True, False)


def test_a_pair_whose_response_alone_is_too_long(bert) -> None:
    model, conversation = scorer(bert, label=1, max_length=6, text="pair"), user("w1 w2", RESPONSE)
    expected = of_ids(bert, [2, 3, *ids_of(bert, RESPONSE)[-3:], 3], token_type_ids=[0] * 2 + [1] * 4)
    assert model.score([conversation]) == near([float(expected[1])])
    assert model.inspect(conversation) == ("[CLS] [SEP] w21 w22 w23 [SEP]", 6, True, True)


def test_a_long_chat_keeps_its_bos_and_its_end(llama) -> None:
    model, conversation = scorer(llama, max_length=12), user(PROMPT, RESPONSE)
    ids = ids_of(llama, f"<s>user: {PROMPT} </s> assistant: {RESPONSE} </s>")
    assert model.score([conversation]) == near([float(of_ids(llama, [1, *ids[-11:]])[0])])
    expected = f"<s> w8 w9 </s> assistant: {RESPONSE} </s>"
    assert model.inspect(conversation) == (expected, 12, True, False)
    # The prompt ends with "assistant:". With one token less, the response is truncated.
    assert scorer(llama, max_length=8).inspect(conversation) == (f"<s> {RESPONSE} </s>", 8, True, False)
    assert scorer(llama, max_length=7).inspect(conversation) == ("<s> w19 w20 w21 w22 w23 </s>", 7, True, True)


def test_a_long_response_keeps_its_end(gpt2) -> None:
    model, conversation = scorer(gpt2, label=2, max_length=4, text="response"), user(PROMPT, RESPONSE)
    assert model.score([conversation]) == near([float(of_ids(gpt2, ids_of(gpt2, RESPONSE)[-4:])[2])])
    assert model.inspect(conversation) == ("w20 w21 w22 w23", 4, False, True)


@pytest.mark.parametrize(("model", "limit"), [("bert", 64), ("gpt2", 48)])
def test_the_default_limit_is_that_of_the_model(request, model, limit) -> None:
    loaded = scorer(request.getfixturevalue(model), label=0)
    conversation = user(" ".join([LONG] * 5), " " + RESPONSE)
    assert loaded.inspect(conversation).length == limit and math.isfinite(loaded.score([conversation])[0])


def test_the_default_limit_is_that_of_the_tokenizer_if_it_is_less(gpt2, tmp_path) -> None:
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    save_tokenizer(tmp_path, GPT2, model_max_length=5)
    assert scorer(str(tmp_path), label=0).inspect(user(PROMPT, RESPONSE)).length == 5
    assert scorer(str(tmp_path), label=0, max_length=7).inspect(user(PROMPT, RESPONSE)).length == 7


# Labels and outputs


@pytest.mark.parametrize(
    ("label", "index"), [(2, 2), ("1", 1), ("harmful", 2), ("HARMFUL", 1), ("safe", 0), ("Safe", 0)]
)
def test_labels_by_index_and_by_name(gpt2, label, index) -> None:
    conversation = user("w1", " w2")
    assert scorer(gpt2, label=label).score([conversation]) == near([float(plain(gpt2, conversation, "full")[index])])


def probability(folder: str, label: int, activation) -> list[float]:
    return [float(activation(plain(folder, conversation, "full").double())[label]) for conversation in ragged()]


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_outputs(request, model) -> None:
    folder = request.getfixturevalue(model)
    softmax = functools.partial(torch.softmax, dim=-1)
    expected = probability(folder, 0, torch.sigmoid if model == "llama" else softmax)
    rewards = scorer(folder, label=0, text="full", output="probability").score(ragged())
    odds = scorer(folder, label=0, text="full", output="log_odds").score(ragged())
    assert rewards == near(expected)
    assert odds == near([math.log(p) - math.log1p(-p) for p in expected])


def test_independent_labels_use_a_sigmoid(gpt2, tmp_path) -> None:
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    rewards = scorer(str(tmp_path), label=1, output="probability").score(ragged())
    assert rewards == near(probability(gpt2, 1, torch.sigmoid))
    assert scorer(str(tmp_path), label=1, output="log_odds").score(ragged()) == scorer(gpt2, label=1).score(ragged())


def test_log_odds_of_a_certain_model_are_finite(gpt2, tmp_path) -> None:
    """The probability is 1 in float32, from which the log-odds would be infinite."""
    scaled = AutoModelForSequenceClassification.from_pretrained(gpt2)
    scaled.score.weight.data *= 1000
    scaled.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, GPT2, padding_side="left")
    rewards = scorer(str(tmp_path), label=0, output="log_odds").score(ragged())
    assert all(map(math.isfinite, rewards)) and max(map(abs, rewards)) > 100


def test_a_model_with_nan_weights_gives_nan(gpt2, tmp_path) -> None:
    broken = AutoModelForSequenceClassification.from_pretrained(gpt2)
    broken.score.weight.data[1] = math.nan
    broken.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, GPT2)
    assert all(map(math.isnan, scorer(str(tmp_path), label=1).score(ragged(2))))


def test_dtype(gpt2) -> None:
    exact = scorer(gpt2, label=0, dtype="float32").score(ragged())
    assert exact == scorer(gpt2, label=0).score(ragged())
    rough = scorer(gpt2, label=0, dtype="bfloat16").score(ragged())
    assert rough != exact and rough == pytest.approx(exact, rel=0.1, abs=0.1)
    odds = torch.tensor(scorer(gpt2, label=0, dtype="bfloat16", output="log_odds").score(ragged()))
    rewards = scorer(gpt2, label=0, dtype="bfloat16", output="probability").score(ragged())
    assert rewards == pytest.approx(odds.sigmoid().tolist(), rel=1e-6)  # bfloat16 has three digits
    assert any(torch.tensor(rewards) != torch.tensor(rewards).bfloat16())


# Refusals


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("bert", {}, "2 logits.*label .*0: NEGATIVE, 1: POSITIVE"),
        ("bert", {"label": 2}, "label .*0: NEGATIVE, 1: POSITIVE.*found 2"),
        ("bert", {"label": -1}, "label .*0: NEGATIVE, 1: POSITIVE.*found -1"),
        ("bert", {"label": "neutral"}, "label .*0: NEGATIVE, 1: POSITIVE.*found 'neutral'"),
        ("gpt2", {"label": "Harmful"}, "label .*0: Safe, 1: HARMFUL, 2: harmful.*found 'Harmful'"),
        ("llama", {"label": 1}, "label .*0: LABEL_0.*found 1"),
        ("bert", {"label": 1, "text": "chat"}, "text=chat .*chat template.* has none"),
        ("bert", {"label": 1, "max_length": 65}, "max_length .*at most 64.*found 65"),
        ("bert", {"label": 1, "max_length": 2}, "max_length .*more than the 2 special tokens.*found 2"),
        ("bert", {"label": 1, "max_length": 3, "text": "pair"}, "max_length .*more than the 3 special tokens.*found 3"),
    ],
)
def test_invalid_options_are_refused_at_load(request, model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        scorer(request.getfixturevalue(model), **options)


def test_a_model_without_a_head_is_refused(tmp_path) -> None:
    save_model(tmp_path, "Bert", "Model", **SMALL)
    save_bert_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no trained classification head.*classifier.bias, classifier.weig"):
        scorer(str(tmp_path), label=1)


def test_the_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    save_model(tmp_path, "GPT2", n_embd=16, n_layer=1, n_head=2, num_labels=1)
    save_tokenizer(tmp_path, GPT2 | {f"{name}_token": f"[{name}]" for name in ("sep", "cls", "mask", "pad")})
    with pytest.raises(ValueError, match=f"tokenizer .*{SIZE + 1} tokens.*only {SIZE} embeddings"):
        scorer(str(tmp_path))


def test_a_model_and_a_tokenizer_without_limits_need_one(tmp_path) -> None:
    save_model(tmp_path, "XLNet", **OTHERS["XLNet"], num_labels=1)
    save_bert_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="max_length is required.*neither the model nor the tokenizer"):
        scorer(str(tmp_path))


def test_options_from_text() -> None:
    options = HfOptions.model_validate(
        {"label": "2", "max_length": "512", "batch_size": "8", "trust_remote_code": "true", "replicas": "2"}
        | {"gpus": "0.25", "output": "log_odds", "text": "pair", "dtype": "bfloat16"}
    )
    assert (options.label, options.max_length, options.batch_size, options.trust_remote_code) == (2, 512, 8, True)
    assert (options.replicas, options.gpus) == (2, 0.25)
    assert HfOptions(label="POSITIVE").label == "POSITIVE" and HfOptions(gpus=0).gpus == 0


@pytest.mark.parametrize(
    "option",
    [{key: True} for key in ("label", "max_length", "batch_size", "replicas", "gpus")]
    + [{"batch_size": 0}, {"max_length": "0"}, {"replicas": 0}, {"label": 1.5}, {"dtype": "int8"}, {"text": "html"}]
    + [{"gpus": gpus} for gpus in (-1, 2, 0.12345, "nan", "inf")]
    + [{"output": "loss"}, {"temperature": 1}],
)
def test_options_out_of_range(option) -> None:
    with pytest.raises(ValidationError):
        HfOptions.model_validate(option)


def test_locations_of_a_model(bert, tmp_path) -> None:
    check_model(bert, HfOptions())
    check_model("lvwerra/distilbert-imdb", HfOptions())
    with pytest.raises(ValueError, match="no reward model in .*config.json"):
        check_model(str(tmp_path), HfOptions())
    for location in ("./missing", "/missing", "~/missing", "a/b/c"):
        with pytest.raises(ValueError, match=f"no such folder: {location}"):
            check_model(location, HfOptions())


def test_transformers_is_imported_only_for_this_kind() -> None:
    """At the top of a module; functions may import it."""
    package = Path(pama_plugin.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(module.partition(".")[0] == "transformers" or module.endswith("rewards.hf") for module in modules):
                importers.add(path.relative_to(package).as_posix())
    assert {importer for importer in importers if not importer.startswith("host/")} == {"rewards/hf.py"}


def test_a_folder_without_a_tokenizer_is_refused(bert, tmp_path) -> None:
    """Transformers creates one that encodes every text in the same way."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(bert) / name, tmp_path)
    with pytest.raises(ValueError, match="tokenizer, one of tokenizer.json, .*found none"):
        HfScorer(str(tmp_path), HfOptions(), "cpu")


def test_several_labels_of_one_forward_equal_each_label_alone(bert) -> None:
    texts = [Conversation([{"role": "user", "content": PROMPT}], text) for text in (RESPONSE, LONG, "w1")]
    for output in ("logit", "probability", "log_odds"):
        alone = [HfScorer(bert, HfOptions(label=label, output=output), "cpu").score(texts) for label in (1, "NEGATIVE")]
        both = HfScorer(bert, HfOptions(output=output), "cpu", keys=(1, "NEGATIVE"))
        assert both.score(texts) == both.score_each(texts) == [list(each) for each in zip(*alone)]
    with pytest.raises(ValueError, match="label must be one of .*found 'NEUTRAL'"):
        HfScorer(bert, HfOptions(), "cpu", keys=(1, "NEUTRAL"))

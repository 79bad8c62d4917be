"""The smallest language model that vLLM's CPU attention takes, and its tokenizer, made on the fly."""

from transformers import LlamaConfig, PreTrainedTokenizerFast

WORDS = "the a film plot actor scene was is never always dull bright slow warm and but of with".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # head size 32, the smallest that vLLM's CPU attention takes
        max_position_embeddings=128,
        tie_word_embeddings=True,  # a tied head is what the weight sync must not leave behind
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def make_prompts(count: int) -> list[str]:
    return [" ".join(WORDS[(index + shift * 3) % len(WORDS)] for shift in range(4)) for index in range(count)]

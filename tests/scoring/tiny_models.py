"""Tiny random models: classifiers and causal language models of several kinds, with a tokenizer of one token per word."""

from __future__ import annotations

from typing import Any

from tests.conftest import WORDS, tiny_encoder_config

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<bot>", "<end>"]
VOCABULARY = [*SPECIAL, *dict.fromkeys([*WORDS, "bad", "red", "green", "blue", "wide", "deep"])]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompt, please') }}{% endif %}"
    "{{ {'user': '<user> ', 'assistant': '<bot> '}.get(m['role'], '<' + m['role'] + '> ') }}"
    "{{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def rated_rows(count: int) -> list[dict[str, Any]]:
    """Return rows in words that the models know, with ratings of soundness and worth and a fault."""
    return [
        {
            "instruction": f"Name the colour {i}",
            "input": "",
            "output": "It is" + " blue" * (1 + i % 4),
            "soundness": 2 + 7 * (i % 2),
            "worth": 1 + i % 9,
            "fault": "none" if i % 2 else "wrong",
        }
        for i in range(count)
    ]


def save_words(folder: str, kind: str, template: str | None = None) -> None:
    """Save a tokenizer with special tokens as a kind of model has them: `"bert"`, `"roberta"` or `"llama"`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens(SPECIAL)
    names: dict[str, Any] = {"unk_token": "[UNK]"}
    if kind == "llama":
        names |= {"eos_token": "<end>"}
    else:
        types = (":0", ":1") if kind == "bert" else ("", "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair=f"[CLS] $A{types[0]} [SEP]{types[0]} $B{types[1]} [SEP]{types[1]}",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["model_input_names"] = ["input_ids", *(["token_type_ids"] if kind == "bert" else []), "attention_mask"]
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=60, **names)
    found.chat_template = template
    found.save_pretrained(folder)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=6,
        pad_token_id=None,
    )


def save_classifier(folder: str, kind: str, labels: tuple[str, ...] = ("good",), template: str | None = None) -> str:
    """Save a random classifier of a kind (`"bert"`, `"roberta"`, `"electra"`, `"llama"`) and return its folder."""
    import torch
    import transformers

    encoder = tiny_encoder_config().to_dict()
    sizes = {
        name: encoder[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    options = {**sizes, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "pad_token_id": 0}
    config = {
        "bert": lambda: transformers.BertConfig(**options),
        "roberta": lambda: transformers.RobertaConfig(**options, type_vocab_size=1),
        "electra": lambda: transformers.ElectraConfig(**options, embedding_size=16),
        "llama": _llama,
    }[kind]()
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    _spread(model)
    model.save_pretrained(folder)
    save_words(folder, kind if kind != "electra" else "bert", template)
    return folder


def save_language_model(folder: str, kind: str = "llama", template: str | None = None) -> str:
    """Save a random causal language model (`"llama"`, `"gpt2"`, or `"gemma2"` with capped logits); return its folder."""
    import torch
    import transformers

    config = {
        "llama": _llama,
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=6, eos_token_id=6
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            **{
                **{name: value for name, value in _llama().to_dict().items() if "_size" in name or "num_" in name},
                **{"head_dim": 8, "max_position_embeddings": 64, "final_logit_softcapping": 2.0},
                **{"pad_token_id": 0, "bos_token_id": 6, "eos_token_id": 6},
            }
        ),
        "bert": lambda: transformers.BertConfig(
            **{**tiny_encoder_config().to_dict(), "vocab_size": len(VOCABULARY), "is_decoder": False}
        ),
    }[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    _spread(model)
    model.save_pretrained(folder)
    save_words(folder, "llama", template)
    return folder


def _spread(model: Any) -> None:
    """Draw larger weights: with the usual ones, all scores would be nearly equal."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)

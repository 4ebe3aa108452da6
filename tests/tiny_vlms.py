"""Tiny random vision-language models, built and saved without network in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

KINDS = ("llava", "idefics3", "paligemma", "blip")
TEXT = ["The coloured regions mark a cat and a dog.", "Does each region cover its object?", "Answer the question."]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(words: tuple[str, ...] = ("Yes", "No")) -> Any:
    """A byte-level BPE tokenizer of 300 tokens, with one token for each word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"]
    )
    made.add_tokens(list(words))
    return made


def _vision(config: type, **extra: Any) -> Any:
    return config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        **extra,
    )


def _text(config: type, size: int, **extra: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return config(**sizes, vocab_size=size, max_position_embeddings=1024, **extra)


def _llava(words: tuple[str, ...]) -> tuple[Any, Any]:
    tok = tokenizer(words)
    processor = tf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    config = tf.LlavaConfig(
        vision_config=_vision(tf.CLIPVisionConfig, projection_dim=32),
        text_config=_text(tf.LlamaConfig, len(tok), num_key_value_heads=4, pad_token_id=tok.pad_token_id),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def _idefics3(words: tuple[str, ...]) -> tuple[Any, Any]:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = tf.Idefics3Processor(images, tokenizer(words), image_seq_len=4, chat_template=CHAT)
    tok = processor.tokenizer
    config = tf.Idefics3Config(
        vision_config=_vision(tf.models.idefics3.configuration_idefics3.Idefics3VisionConfig).to_dict(),
        text_config=_text(tf.LlamaConfig, len(tok), num_key_value_heads=4, pad_token_id=tok.pad_token_id),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


def _paligemma(words: tuple[str, ...]) -> tuple[Any, Any]:
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(images, tokenizer(words), chat_template=CHAT)
    tok = processor.tokenizer
    config = tf.PaliGemmaConfig(
        vision_config=_vision(tf.SiglipVisionConfig, vision_use_head=False, projection_dim=32),
        text_config=_text(tf.GemmaConfig, len(tok), num_key_value_heads=1, head_dim=8, pad_token_id=tok.pad_token_id),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def _blip(words: tuple[str, ...]) -> tuple[Any, Any]:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *("##" + letter for letter in letters)]
    vocab += [word.lower() for word in words] + ["##no", "##yes"]
    tok = tf.BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)})
    processor = tf.BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tok)
    config = tf.BlipConfig(
        vision_config=_vision(tf.BlipVisionConfig).to_dict(),
        text_config=_text(
            tf.BlipTextConfig, len(vocab), encoder_hidden_size=32, bos_token_id=5, pad_token_id=0, sep_token_id=3
        ).to_dict(),
        projection_dim=32,
    )
    return tf.BlipForQuestionAnswering(config), processor


def build(kind: str, folder: Path, words: tuple[str, ...] = ("Yes", "No"), seed: int = 0, spread: float = 6) -> Path:
    """Save a tiny model of a kind with its processor; random weights, times `spread` so that answers differ."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model, processor = {"llava": _llava, "idefics3": _idefics3, "paligemma": _paligemma, "blip": _blip}[kind](words)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(spread)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def text_only(folder: Path) -> Path:
    """A tiny Llama: no image input."""
    tok = tokenizer()
    tf.LlamaForCausalLM(_text(tf.LlamaConfig, len(tok), num_key_value_heads=4)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder

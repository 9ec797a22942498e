"""Tiny real models and a byte tokenizer, for tests of this package and of plug-ins. Nothing is downloaded.

Example:
    >>> model = pico_model("llama", seed=0)
    >>> sum(p.numel() for p in model.parameters()) < 200_000
    True
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MIXED = ["linear_attention", "full_attention"]
_PICO: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150_000.0},
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    # State-space models and recurrent networks.
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {
        "hidden_size": 64,
        "qk_dim_factor": 1.0,
        "num_heads": 2,
        "chunk_size": 8,
        "autocast_kernel_dtype": "float32",
    },
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 512},
    # Hybrids: one of these layers and one attention layer, or both in each layer.
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "shared_intermediate_size": 24,
        "layer_types": _MIXED,
    },
    "qwen3_next": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": _MIXED,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template and one token per byte, after five special tokens.

    The end token ends every turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")  # noqa: S106
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pico_config(architecture: str = "llama", **overrides: Any) -> Any:
    """Return the configuration of a two-layer, hidden-32 model of a real architecture (a grouped-query Llama)."""
    settings: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if architecture == "gpt2":
        settings = {k: settings[k] for k in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")}
    from stayaligned.hf.tiny_models import new_config

    return new_config(architecture, **{**settings, **_PICO.get(architecture, {}), **overrides})


def pico_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a causal language model with random weights, in fp32 on the CPU; equal seeds give equal weights."""
    from stayaligned.hf.tiny_models import new_language_model

    return new_language_model(pico_config(architecture, **overrides), seed=seed).eval()


def write_pico_checkpoint(
    directory: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    ancestor: int | None = None,
    shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Write a pico model and the byte tokenizer as an ordinary checkpoint directory; return the directory.

    Args:
        directory: where to write.
        architecture: a model type, as in `pico_model`.
        seed: seed of the weights.
        ancestor: seed of another model that this one shall look like a fine-tune of: half of the model of `seed` is
            added to it. Models of different seeds are unrelated, and no base and aligned model.
        shard_size: the largest size of a file.
        overrides: settings of the configuration.
    """
    model = pico_model(architecture, seed=seed, **overrides)
    if ancestor is not None:
        import torch

        origin = dict(pico_model(architecture, seed=ancestor, **overrides).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(0.5).add_(origin[name])
    model.save_pretrained(directory, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_pico_adapter(
    directory: Path,
    checkpoint: Path,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    dtype: str = "float32",
    **lora: Any,
) -> Path:
    """Write a LoRA adapter with random factors for a checkpoint, with PEFT; return the adapter's directory.

    Args:
        directory: where to write; an adapter named other than "default" is put into a subdirectory of that name.
        checkpoint: the model directory.
        seed: seed of the factors.
        adapter_name: PEFT's name of the adapter.
        dtype: type of the stored factors.
        lora: settings of LoraConfig; by default rank 4 on q_proj and v_proj.
    """
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # advice for training: fan_in_fan_out, tied weights
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**settings), adapter_name)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
                parameter.data = parameter.data.to(getattr(torch, dtype))
        adapted.save_pretrained(str(directory))
    return directory if adapter_name == "default" else directory / adapter_name

"""Tiny models with random weights of many families, made from their configuration classes, and what becomes
of each on its way through cbnb."""

import dataclasses
import inspect
import math
import warnings

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    n_embd=32,
    n_layer=4,
    n_head=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    intermediate_size_mlp=64,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_k=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=64,
    index_head_dim=8,
    index_n_heads=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    sliding_window=64,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_d_ssm=64,
    ssm_state_size=8,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=1,
    state_size=8,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=96,
    laurel_rank=8,
)

# multi-head latent attention: heads of the rotary part, of both parts
LATENT = dict(head_dim=8, qk_head_dim=16, num_key_value_heads=4)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
LATENT_LINEARS = "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj"
MAMBA = "in_proj,out_proj"
FUSED = "experts.gate_up_proj,experts.down_proj"
DENSE = "gate_proj,up_proj,down_proj"

# {name: (model type, more of its configuration, LoRA's names where the usual seven do not fit)}
FAMILIES = {
    "Llama": ("llama", {}, None),
    "Mistral": ("mistral", {}, None),
    "Ministral": ("ministral", {}, None),
    "Ministral 3": ("ministral3", {}, None),
    "Mistral 3 (multimodal)": (
        "mistral3",
        dict(text="mistral", vision=("pixtral", VISION), image_token_index=90),
        None,
    ),
    "Mixtral": ("mixtral", {}, f"{ATTENTION},{FUSED}"),
    "Qwen 2": ("qwen2", {}, None),
    "Qwen 3": ("qwen3", {}, None),
    "Qwen 3 MoE": ("qwen3_moe", {}, f"{ATTENTION},{FUSED}"),
    "Qwen3-Next": ("qwen3_next", {}, f"{ATTENTION},in_proj_qkvz,in_proj_ba,out_proj,{FUSED}"),
    "Qwen 3.5": ("qwen3_5_text", {}, f"{ATTENTION},in_proj_qkv,in_proj_z,out_proj,{DENSE}"),
    "Qwen 3.5 MoE": ("qwen3_5_moe_text", {}, f"{ATTENTION},in_proj_qkv,in_proj_z,out_proj,{DENSE},{FUSED}"),
    "Gemma 2": ("gemma2", {}, None),
    "Gemma 3": ("gemma3_text", {}, None),
    "Gemma 3 (multimodal)": (
        "gemma3",
        dict(
            text="gemma3_text",
            vision=("siglip_vision_model", VISION),
            mm_tokens_per_image=4,
            image_token_index=90,
            boi_token_index=91,
            eoi_token_index=92,
        ),
        None,
    ),
    "Gemma 3n": ("gemma3n_text", dict(num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 4), None),
    "Gemma 4": (
        "gemma4_text",
        dict(head_dim=None, num_kv_shared_layers=1, layer_types=["full_attention"] * 4),
        None,
    ),
    "Gemma 4 MoE": (
        "gemma4_text",
        dict(head_dim=None, num_kv_shared_layers=0, enable_moe_block=True, top_k_experts=2),
        f"{ATTENTION},{DENSE},{FUSED}",
    ),
    "Gemma 4 unified": ("gemma4_unified_text", dict(head_dim=None), None),
    "gpt-oss": ("gpt_oss", {}, f"{ATTENTION},{FUSED}"),
    "Granite": ("granite", {}, None),
    "Granite MoE": ("granitemoe", {}, ATTENTION),
    "Granite hybrid": (
        "granitemoehybrid",
        dict(layer_types=["mamba", "attention"] * 2, shared_intermediate_size=48, mamba_expand=2),
        f"{MAMBA},q_proj,input_linear,output_linear",
    ),
    "LFM 2": (
        "lfm2",
        dict(layer_types=["conv", "full_attention"] * 2, block_multiple_of=8),
        "in_proj,out_proj,q_proj,k_proj,v_proj,w1,w2,w3",
    ),
    "OLMo 2": ("olmo2", {}, None),
    "OLMo 3": ("olmo3", {}, None),
    "OLMoE": ("olmoe", {}, f"{ATTENTION},{FUSED}"),
    "OLMo hybrid": ("olmo_hybrid", {}, None),
    "SmolLM3": ("smollm3", {}, None),
    "Llama 4": ("llama4_text", {}, None),
    "Phi": ("phi", {}, "q_proj,k_proj,v_proj,dense,fc1,fc2"),
    "Phi 3": ("phi3", {}, "qkv_proj,o_proj,gate_up_proj,down_proj"),
    "Phi 3.5 MoE": ("phimoe", dict(router_jitter_noise=0.0, input_jitter_noise=0.0), ATTENTION),
    "DeepSeek V3": ("deepseek_v3", LATENT, f"{LATENT_LINEARS},shared_experts.down_proj,{FUSED}"),
    "DeepSeek V3.2": ("deepseek_v32", LATENT, f"{LATENT_LINEARS},{DENSE}"),
    "DeepSeek V4": (
        "deepseek_v4",
        dict(o_groups=2, o_lora_rank=8),
        f"q_a_proj,self_attn.q_b_proj,self_attn.kv_proj,o_b_proj,{FUSED}",
    ),
    "GLM 4": ("glm4", {}, "q_proj,k_proj,v_proj,o_proj,gate_up_proj,down_proj"),
    "GLM 4.5": ("glm4_moe", {}, f"{ATTENTION},{DENSE},{FUSED}"),
    "Kimi-Linear": (
        "kimi_linear",
        dict(
            LATENT,
            linear_head_dim=8,
            linear_num_heads=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        ),
        "q_proj,k_proj,v_proj,o_proj",
    ),
    "MiniMax": ("minimax", {}, "qkv_proj,out_proj,output_gate"),
    "MiniMax M2": ("minimax_m2", {}, f"{ATTENTION},{FUSED}"),
    "Nemotron-H": (
        "nemotron_h",
        dict(layers_block_type=["mamba", "attention", "mlp", "mamba"]),
        "in_proj,q_proj,k_proj,v_proj,o_proj,up_proj,down_proj",
    ),
    "Seed-OSS": ("seed_oss", dict(attention_dropout=0.0, residual_dropout=0.0), None),
    "EXAONE 4": ("exaone4", {}, None),
    "Cohere": ("cohere", {}, None),
    "Cohere 2": ("cohere2", {}, None),
    "Falcon-H1": ("falcon_h1", {}, f"{ATTENTION},in_proj,{DENSE}"),
    "Falcon Mamba": ("falcon_mamba", {}, "in_proj,x_proj"),
    "Bamba": ("bamba", dict(attn_layer_indices=[1]), f"in_proj,{DENSE}"),
    "ERNIE 4.5": ("ernie4_5", {}, None),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {}, f"{ATTENTION},{FUSED}"),
    "Hunyuan": ("hunyuan_v1_dense", {}, None),
    "Hunyuan MoE": ("hunyuan_v1_moe", {}, f"{ATTENTION},{FUSED}"),
    "HY 3": ("hy_v3", {}, f"{ATTENTION},{FUSED}"),
    "Starcoder 2": ("starcoder2", {}, "q_proj,k_proj,v_proj,o_proj,c_fc,c_proj"),
    "StableLM": ("stablelm", {}, None),
    "Apertus": ("apertus", {}, "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"),
    "nanochat": ("nanochat", {}, "q_proj,k_proj,v_proj,o_proj,fc1,fc2"),
    "GPT-NeoX": ("gpt_neox", {}, "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"),
    "GPT-2": ("gpt2", dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), "c_attn,c_proj,c_fc"),
    "RecurrentGemma": ("recurrent_gemma", {}, f"{ATTENTION},linear_x,linear_y,linear_out,{DENSE}"),
    "BERT": ("bert", {}, "query,key,value"),
}


def tiny_config(kind: str, text: str | None = None, vision=None, **more):
    """A configuration of that model type as small as `SMALL` makes it; `text` and `vision`: its parts, where
    it is multimodal."""
    if text:
        return CONFIG_MAPPING[kind](
            text_config=tiny_config(text), vision_config=CONFIG_MAPPING[vision[0]](**vision[1]), **more
        )
    cls = CONFIG_MAPPING[kind]
    known = (
        {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls.__init__).parameters)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = {
            k: v
            for k, v in SMALL.items()
            if k in known and not (k in ("sliding_window", "q_lora_rank") and getattr(cls, k, 0) is None)
        } | more
        return cls(**{k: v for k, v in small.items() if v is not None})


def tiny_model(name: str, vocabulary: int = 96):
    """A random model of a family in float32, frozen, in eval mode, with weights large enough that each of
    them matters."""
    kind, more, _ = FAMILIES[name]
    config = tiny_config(kind, **more)
    config.get_text_config().vocab_size = vocabulary
    if hasattr(config.get_text_config(), "vocab_size_per_layer_input"):
        config.get_text_config().vocab_size_per_layer_input = vocabulary
    torch.manual_seed(0)
    auto = (
        AutoModelForCausalLM
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        else transformers.AutoModelForImageTextToText
    )
    model = auto.from_config(config)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() > 1 and "A_log" not in path:
                torch.nn.init.normal_(p, std=1 / math.sqrt(p.shape[-1]))
    return model.eval().requires_grad_(False)

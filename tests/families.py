"""Kinds of model, by name: the family in config.json, and what of a small one's config is other than Llama's."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
CASES = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama 3.2, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama, linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "tinyllama": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2.5, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows above": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "phi 3": ("phi3", {}),
    "phi 3, window": ("phi3", {"sliding_window": 12, "num_key_value_heads": 4}),
    "gemma 3": ("gemma3_text", {"head_dim": 16, "sliding_window": 10, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                                "query_pre_attn_scalar": 24, "tie_word_embeddings": True,
                                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
}

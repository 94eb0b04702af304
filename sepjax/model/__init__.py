"""One decoder whose config expresses Llama, Qwen, Gemma, OLMo, GPT-NeoX and the like."""

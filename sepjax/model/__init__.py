"""One decoder whose config expresses Llama, GPT-NeoX, GPT-2 and Falcon."""

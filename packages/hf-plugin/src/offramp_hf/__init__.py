"""Early exit for Hugging Face transformers models: install it beside offramp and use offramp's own functions."""

"""Early exit for diffusers models: install it beside offramp and use offramp's own functions."""

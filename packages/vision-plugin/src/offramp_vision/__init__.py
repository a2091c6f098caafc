"""Early exit for timm vision models: install it beside offramp and use offramp's own functions."""

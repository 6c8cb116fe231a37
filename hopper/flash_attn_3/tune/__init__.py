"""The tuner: `python -m flash_attn_3.tune` measures the tiles that kernels can have and writes the planner's table."""

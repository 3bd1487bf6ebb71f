"""These programs use mhc_mlx."""

"""What ``python -m mhc_mlx.device_report`` runs: it reports how a device runs these kernels."""

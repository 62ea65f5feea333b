"""The site process: policy, ledger, data, trainer and DP-SGD."""

"""The site: its process, its rules, its data and ledger, training and DP-SGD."""

"""DP-SGD at the sites of a stack: per-row gradients, clipping, noise, and proofs that rows do not mix."""

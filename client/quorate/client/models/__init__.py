"""Base models at a site, found by hash; trying an adapter, and merging one into its base."""

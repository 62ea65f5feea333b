"""A federation at the coordinator: its folder, which node is which site, Flower's ServerApp."""

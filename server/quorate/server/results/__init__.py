"""After the last round: outputs, delivery to the sites, model card, comparison of seeds."""

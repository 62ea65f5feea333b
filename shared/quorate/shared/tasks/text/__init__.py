"""What tasks on texts share: tokenising, packing, words."""

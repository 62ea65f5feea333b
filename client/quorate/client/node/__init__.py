"""What runs Flower at a site: the SuperNode, what guards it, and the checks before it starts."""

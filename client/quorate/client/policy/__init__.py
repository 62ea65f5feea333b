"""What a site allows, and what it answered before: rules of site.yaml, approvals, limits, stored answers."""

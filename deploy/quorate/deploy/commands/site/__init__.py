"""`quorate site` and what else a site's people type: with `both`, all commands of the sites' wheel."""

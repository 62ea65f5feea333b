"""What crosses between coordinator and site: messages, what of them leaves a site, versions, bundle."""

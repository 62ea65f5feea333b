"""Provisioning: from `federation.yaml` to a CA, the server's certificate and one start-up kit per site."""

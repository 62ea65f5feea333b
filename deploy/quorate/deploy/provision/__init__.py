"""Provisioning: from `federation.yaml` to a CA, the server's certificate and one start-up kit per site.

provision.py   the federation's folder, made or completed
authority.py   the CA: what it signs and revokes
index.py       the record of every certificate issued or revoked
keys.py        node keys: admitted, revoked
kit.py         a site's start-up kit
"""

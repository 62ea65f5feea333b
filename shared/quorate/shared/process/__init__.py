"""Programs and files on one machine: supervisor, logs, loopback TLS, atomic files, secrets."""

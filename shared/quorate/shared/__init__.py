"""What server and client both speak: configuration, tasks, adapters, aggregation rules, messages, privacy."""

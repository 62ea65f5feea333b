"""The coordinator: rounds, exchanges with the sites, privacy at the server, results and reports."""

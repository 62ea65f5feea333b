"""The site's process, and the way into it from Flower: ClientApp, socket, gRPC service, handlers."""

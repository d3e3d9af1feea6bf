"""The demo's model behind an HTTP server, and a load test of it."""

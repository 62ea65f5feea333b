"""Configuration: run files and sites files as frozen pydantic models."""

"""Shared by the tests: small real recipes and runs."""

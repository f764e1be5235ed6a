"""What tests share: small real recipes and runs."""

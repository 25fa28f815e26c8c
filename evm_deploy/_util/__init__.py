"""Helpers that do not depend on models, targets or bundles."""

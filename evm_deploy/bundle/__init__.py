"""Bundles as apps use them: no torch, no export."""

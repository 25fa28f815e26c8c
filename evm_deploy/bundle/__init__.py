"""What an app needs of a bundle: no torch, no export."""

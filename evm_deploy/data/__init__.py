"""Images and how they are prepared."""

"""Images: reading, sampling, preprocessing."""

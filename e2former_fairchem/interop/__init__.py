"""Other people's weights, and other programs."""

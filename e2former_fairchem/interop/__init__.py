"""Reading other people's weights."""

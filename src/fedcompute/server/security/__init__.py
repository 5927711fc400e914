"""What the server refuses: bodies that are too large, URLs that nobody signed."""

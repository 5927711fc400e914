"""What a person sees of the rounds: metrics as series, and pictures of them."""

"""Selection: likelihood on some tokens only, as a threshold, the data or a comparison of losses selects them."""

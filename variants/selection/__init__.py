"""Selection: likelihood of some tokens only, selected by a threshold, by the data or by a comparison of losses."""

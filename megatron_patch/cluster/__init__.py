"""What the hosts of a run have, and whether it is the same."""

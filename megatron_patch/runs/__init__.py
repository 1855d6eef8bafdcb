"""What runs left behind, ours and others', read back."""

"""Many runs over a grid or a search: resumable, with any launcher."""

"""One command that tries everything on the machine at hand: runs in processes of their own, and lines about them."""

"""`rayft tune`: many trials of one recipe, and what a person sees of them."""

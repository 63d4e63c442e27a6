"""Commands that have a file of their own; ``htsat.cli`` registers them."""

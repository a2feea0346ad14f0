"""What the page of a run and the README's figures are made of: the numbers, the plots, the page."""

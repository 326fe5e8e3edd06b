"""Training algorithms of populations, one file each; `registry` names them."""

"""``python -m privtrain``: what ``accelerate launch -m privtrain`` runs."""

from privtrain.cli import main

main()

"""What a GPU can tell in minutes: ``run.sh`` measures, ``report`` draws what came out."""

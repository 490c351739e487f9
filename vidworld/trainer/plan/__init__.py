"""What a training run will need and how long it will take, before it is started."""

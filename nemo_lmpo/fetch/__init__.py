"""What a recipe needs of the hub, brought to this machine or into a folder for an offline cluster."""

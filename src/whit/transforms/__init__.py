"""Changes of the weights that leave the function of the model as it is and make it easier to round."""

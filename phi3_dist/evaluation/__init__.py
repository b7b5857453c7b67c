"""How good a trained model is: losses by row, scores of answers, and intervals of differences by the bootstrap."""

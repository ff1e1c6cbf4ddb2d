"""The learner: state, and the jitted programs that score, credit and update."""

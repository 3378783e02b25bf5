"""What a fitted method answers: one base class a task, with its predictions and its score."""
